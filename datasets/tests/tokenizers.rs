//! Tokenizers built from GGUF metadata, on vocabularies small enough to follow by hand.

use thermocline_datasets::gguf::{Array, Value};
use thermocline_datasets::write::{TinyGgufType, TinyModel, tiny_gguf, tiny_tokenizer_json};
use thermocline_datasets::{Tokenizer, open_checkpoint};

const TEXTS: [&str; 6] = [
    "the thing and the string",
    "  two  spaces\n\tand a tab ",
    "",
    "é 语言 \u{1F980}",
    "<|im_start|>user",
    "it's 12345 o'clock",
];

/// SentencePiece's usual layout: unknown, beginning, end, 256 bytes, then pieces, the better the earlier.
fn sentence_piece() -> TinyModelFile {
    let pieces = ["▁t", "he", "▁the", "in", "ing", "th", "▁", "t", "h", "e", "i", "n", "g", "s", "r", "a", "d"];
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(pieces.map(String::from));
    let kinds = (0..tokens.len())
        .map(|i| {
            if i == 0 {
                2
            } else if i < 3 {
                3
            } else if i < 259 {
                6
            } else {
                1
            }
        })
        .collect();
    let scores = (0..tokens.len()).map(|i| if i < 259 { 0.0 } else { 259.0 - i as f32 }).collect();
    let model = TinyModel { vocab_size: tokens.len(), n_layers: 1, ..TinyModel::default() };
    let mut file = tiny_gguf(&model, 1, TinyGgufType::F32);
    file.set("tokenizer.ggml.model", "llama").set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    file.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    file.set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    file.set("tokenizer.ggml.bos_token_id", 1u32).set("tokenizer.ggml.eos_token_id", 2u32);
    file.metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token" && key != "tokenizer.ggml.merges");
    TinyModelFile(file.to_bytes())
}

struct TinyModelFile(Vec<u8>);

impl TinyModelFile {
    fn open(&self) -> (Tokenizer, Option<u32>) {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, &self.0).expect("written");
        let checkpoint = open_checkpoint(&path).expect("opened");
        let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json().expect("json")).expect("tokenizer");
        (tokenizer, checkpoint.config().bos_token_id)
    }
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let (tokenizer, bos) = sentence_piece().open();
    let pieces = |text: &str, special: bool| -> Vec<String> {
        let ids = tokenizer.encode(text, special).expect("ids");
        ids.into_iter().map(|id| tokenizer.id_to_token(id).expect("token")).collect()
    };
    assert_eq!(bos, Some(1));
    assert_eq!(pieces("the thing", true), ["<s>", "▁the", "▁t", "h", "ing"]);
    assert_eq!(pieces("the", false), ["▁the"]);
    assert_eq!(pieces("é", false), ["▁", "<0xC3>", "<0xA9>"]);
    for text in ["the thing and é 语言 \u{1F980}", " a  b\nc"] {
        let ids = tokenizer.encode(text, true).expect("ids");
        assert_eq!(tokenizer.decode(&ids).expect("text"), text);
        let mut stream = tokenizer.decode_stream();
        let mut streamed: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
        streamed.extend(stream.finish());
        assert_eq!(streamed, text);
    }
}

#[test]
fn a_gguf_tokenizer_is_the_same_as_the_folders() {
    let model = TinyModel::default();
    let folder = Tokenizer::from_json(&tiny_tokenizer_json(&model)).expect("tokenizer");
    let (gguf, _) = TinyModelFile(tiny_gguf(&model, 1, TinyGgufType::F32).to_bytes()).open();
    for text in TEXTS {
        assert_eq!(gguf.encode(text, true).expect("ids"), folder.encode(text, true).expect("ids"), "{text:?}");
    }
    assert_eq!(gguf.vocab_size(), folder.vocab_size());
    assert_eq!(gguf.document_separator(), Some(0));
}

#[test]
fn splitting_rules_keep_digits_as_their_models_do() {
    for (name, digits) in [("smollm", 5), ("qwen2", 5), ("llama-bpe", 2), ("gpt-2", 1)] {
        let mut file = tiny_gguf(&TinyModel::default(), 1, TinyGgufType::F32);
        // One merge chain over digits shows how far a word of digits reaches.
        let model = TinyModel::default();
        let mut tokens = thermocline_datasets::write::tiny_tokens(&model);
        let n = tokens.len();
        for (i, merged) in ["12", "123", "1234", "12345", "45"].into_iter().enumerate() {
            tokens[n - 5 + i] = merged.to_owned();
        }
        let merges = ["1 2", "12 3", "4 5", "123 4", "123 45"].map(String::from).to_vec();
        file.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
        file.set("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
        file.set("tokenizer.ggml.pre", name);
        let (tokenizer, _) = TinyModelFile(file.to_bytes()).open();
        assert_eq!(tokenizer.encode("12345", false).expect("ids").len(), digits, "{name}");
        for text in TEXTS {
            let ids = tokenizer.encode(text, false).expect("ids");
            assert_eq!(tokenizer.decode(&ids).expect("text"), text.replace("<|im_start|>", ""), "{name}");
        }
    }
}

#[test]
fn truncation_and_padding_are_switched_off() {
    let json = tiny_tokenizer_json(&TinyModel::default());
    let cut = json.replacen(
        "\"truncation\":null",
        "\"truncation\":{\"direction\":\"Right\",\"max_length\":2,\"strategy\":\"LongestFirst\",\"stride\":0}",
        1,
    );
    assert_ne!(json, cut);
    let tokenizer = Tokenizer::from_json(&cut).expect("tokenizer");
    assert!(tokenizer.encode("q w x y z", false).expect("ids").len() > 2);
    for bad in ["", "{}", "[", &"[".repeat(100_000)] {
        assert!(Tokenizer::from_json(bad).is_err());
    }
}
