use super::{byte_level, sentence_piece};
use crate::gguf::metadata::Metadata;
use crate::gguf::{Array, Value};
use crate::{Error, Result};
use serde_json::{Map, Value as Json, json};

/// What GGUF calls a token: its text and kind. Kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
pub(super) struct Vocabulary<'a> {
    pub tokens: &'a [String],
    pub kinds: Vec<i64>,
    /// Ids by text, as `tokenizer.json` wants them.
    pub ids: Map<String, Json>,
}

/// Builds a `tokenizer.json` from the metadata; the `tokenizers` crate loads it like any other.
pub(crate) fn from_gguf(metadata: &Metadata<'_>) -> Result<String> {
    let key = "tokenizer.ggml.model";
    let model = metadata.str(key)?.ok_or_else(|| metadata.corrupt(key, "the key is missing"))?;
    let vocabulary = Vocabulary::read(metadata)?;
    let mut tokenizer = match model {
        "gpt2" => byte_level::build(metadata, &vocabulary)?,
        "llama" => sentence_piece::build(metadata, &vocabulary)?,
        other => {
            let what = format!("the tokenizer model {other:?}");
            return Err(metadata.unsupported(what, "supported: gpt2, llama".into()));
        }
    };
    let Json::Object(members) = &mut tokenizer else { return Ok(tokenizer.to_string()) };
    members.insert("version".into(), json!("1.0"));
    members.insert("added_tokens".into(), vocabulary.added_tokens());
    if let Some(processor) = beginning(metadata, &vocabulary)? {
        members.insert("post_processor".into(), processor);
    }
    Ok(tokenizer.to_string())
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self> {
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata.strings(key)?.ok_or_else(|| metadata.corrupt(key, "the key is missing"))?;
        let mut ids = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(before) = ids.insert(token.clone(), json!(id)) {
                return Err(metadata.corrupt(key, format!("{token:?} is token {before} and token {id}")));
            }
        }
        let key = "tokenizer.ggml.token_type";
        let kinds = match metadata.get(key) {
            None => vec![1; tokens.len()],
            Some(Value::Array(Array::I32(kinds))) => kinds.iter().map(|k| i64::from(*k)).collect(),
            Some(Value::Array(Array::U32(kinds))) => kinds.iter().map(|k| i64::from(*k)).collect(),
            Some(other) => return Err(metadata.corrupt(key, format!("is a {}, expected int32s", other.type_name()))),
        };
        if kinds.len() != tokens.len() {
            return Err(metadata.corrupt(key, format!("{} kinds for {} tokens", kinds.len(), tokens.len())));
        }
        Ok(Self { tokens, kinds, ids })
    }

    pub fn contains(&self, token: &str) -> bool {
        self.ids.contains_key(token)
    }

    /// Tokens that are found in a text before it is split: control tokens, which decoding leaves out, and
    /// user-defined ones, which it keeps.
    fn added_tokens(&self) -> Json {
        let added =
            self.tokens.iter().zip(&self.kinds).enumerate().filter(|(_, (t, k))| matches!(k, 3 | 4) && !t.is_empty());
        added
            .map(|(id, (content, kind))| {
                json!({"id": id, "content": content, "special": *kind == 3, "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false})
            })
            .collect()
    }
}

/// The step that puts the beginning token (and the end token, if the file asks for it) around a text.
fn beginning(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Option<Json>> {
    let adds_eos = metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let token = |wanted: bool, key: &str| -> Result<Option<(u32, &String)>> {
        let Some(id) = metadata.token_id(key)?.filter(|_| wanted) else { return Ok(None) };
        let token = vocabulary.tokens.get(id as usize);
        let missing = || metadata.corrupt(key, format!("{id}, but there are {} tokens", vocabulary.tokens.len()));
        Ok(Some((id, token.ok_or_else(missing)?)))
    };
    let bos = token(metadata.adds_bos()?, "tokenizer.ggml.bos_token_id")?;
    let eos = token(adds_eos, "tokenizer.ggml.eos_token_id")?;
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let special = |t: Option<(u32, &String)>, n: u32| t.map(|(_, t)| json!({"SpecialToken": {"id": t, "type_id": n}}));
    let text = |name: &str, n: u32| json!({"Sequence": {"id": name, "type_id": n}});
    let around = |name: &str, n: u32| [special(bos, n), Some(text(name, n)), special(eos, n)].into_iter().flatten();
    let single: Vec<Json> = around("A", 0).collect();
    let pair: Vec<Json> = around("A", 0).chain(around("B", 1)).collect();
    let mut special_tokens = Map::new();
    for (id, token) in [bos, eos].into_iter().flatten() {
        special_tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    Ok(Some(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens})))
}

/// The error for a tokenizer that is named but not known.
pub(super) fn unknown_splitter(name: &str) -> Error {
    let reason = format!(
        "the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not supported; supported: {}",
        byte_level::SPLITTERS.iter().map(|s| s.0).collect::<Vec<_>>().join(", ")
    );
    Error::Tokenizer { reason }
}
