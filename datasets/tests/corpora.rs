//! Corpora: which files, in which order, cut how, and what is refused.

use thermocline_datasets::corpus::{Continue, Piece};
use thermocline_datasets::write::{TinyModel, tiny_tokenizer_json};
use thermocline_datasets::{Corpus, Error, Tokenizer};

fn tokenizer() -> Tokenizer {
    Tokenizer::from_json(&tiny_tokenizer_json(&TinyModel::default())).expect("tokenizer")
}

fn documents(corpus: &Corpus) -> Result<Vec<String>, Error> {
    let (mut all, mut current) = (Vec::new(), String::new());
    corpus.read(&mut |piece| {
        match piece {
            Piece::Text(text) => current += text,
            Piece::EndOfDocument => all.push(std::mem::take(&mut current)),
        }
        Ok(Continue::Continue(()))
    })?;
    Ok(all)
}

#[test]
fn files_come_sorted_and_once_whatever_their_kind() {
    let dir = tempfile::tempdir().expect("folder");
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("b.txt"), "second\n").expect("written");
    std::fs::write(at("a.jsonl"), "{\"text\": \"one\"}\n\n{\"text\": \"two\", \"n\": 1}\n").expect("written");
    std::fs::write(at("c.txt"), "").expect("written");
    let corpus = Corpus::open(&[at("b.txt"), at("*.jsonl"), at("?.txt")], None).expect("opened");
    assert_eq!(corpus.files().len(), 3);
    assert_eq!(documents(&corpus).expect("read"), ["one", "two", "second\n"]);
}

#[test]
fn long_files_come_in_pieces_that_add_up() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("long.txt");
    // Lines of all lengths, blank lines, characters of several bytes, and one line beyond every limit.
    let mut text: String =
        (0..20_000).map(|i| format!("{}é line\n{}", "x".repeat(i % 97), "\n".repeat(i % 3))).collect();
    text += &"é".repeat(3 << 20);
    std::fs::write(&path, &text).expect("written");
    let corpus = Corpus::open(&[path.display().to_string()], None).expect("opened");
    let (mut joined, mut largest) = (String::new(), 0);
    corpus
        .read(&mut |piece| {
            if let Piece::Text(text) = piece {
                joined += text;
                largest = largest.max(text.len());
            }
            Ok(Continue::Continue(()))
        })
        .expect("read");
    assert!(joined == text);
    assert!(largest <= 5 << 20, "a piece of {largest} bytes");
    assert_eq!(documents(&corpus.whole(true)).expect("read").len(), 1);
}

#[test]
fn windows_are_full_and_separated_and_stop_in_time() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("a.jsonl");
    std::fs::write(&path, "{\"t\": \"qqq\"}\n{\"t\": \"zzzz\"}\n{\"t\": \"kk\"}\nnot JSON at all\n").expect("written");
    let corpus = Corpus::open(&[path.display().to_string()], Some("t")).expect("opened");
    let tokenizer = tokenizer();
    let id = |t: &str| tokenizer.token_to_id(t).expect("token");
    let (q, z, end) = (id("q"), id("z"), id("<|endoftext|>"));
    // The fourth line is never reached.
    let windows = corpus.token_windows(&tokenizer, 4, 11).expect("windows");
    assert_eq!(windows, [[q, q, q, end], [z, z, z, z]]);
    assert!(matches!(corpus.token_windows(&tokenizer, 4, 1000), Err(Error::Corpus { .. })));
    assert!(matches!(corpus.token_windows(&tokenizer, 0, 1000), Err(Error::Corpus { .. })));
}

#[test]
fn what_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().expect("folder");
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("bad.txt"), b"good \xFF bad").expect("written");
    std::fs::write(at("field.jsonl"), "{\"body\": \"x\"}\n").expect("written");
    std::fs::write(at("number.jsonl"), "{\"text\": 5}\n").expect("written");
    std::fs::write(at("deep.jsonl"), "[".repeat(100_000)).expect("written");
    std::fs::write(at("table.parquet"), "PAR1").expect("written");
    for (name, part) in [
        ("bad.txt", "byte 5"),
        ("field.jsonl", "\"text\""),
        ("number.jsonl", "no text"),
        ("deep.jsonl", "line 1"),
        ("table.parquet", "Parquet"),
    ] {
        let error = documents(&Corpus::open(&[at(name)], None).expect("opened")).expect_err("refused").to_string();
        assert!(error.contains(name) && error.contains(part), "{error}");
    }
    for pattern in [at("nothing.txt"), at("*.nothing"), at("")] {
        assert!(matches!(Corpus::open(&[pattern], None), Err(Error::Corpus { .. })));
    }
    assert!(matches!(Corpus::open(&[], None), Err(Error::Corpus { .. })));
    let one = Corpus::open(&[at("field.jsonl")], Some("body")).expect("opened");
    let error = one.token_windows(&tokenizer(), 100, 1000).expect_err("too short").to_string();
    assert!(error.contains("fewer than one window"), "{error}");
}

#[cfg(feature = "analysis")]
#[test]
fn parquet_columns_are_read_by_name() {
    use polars::prelude::{Column, DataFrame, ParquetWriter};
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("a.parquet");
    let texts = Column::new("body".into(), ["one", "", "two"]);
    let numbers = Column::new("n".into(), [1i64, 2, 3]);
    let mut table = DataFrame::new(3, vec![texts, numbers]).expect("table");
    ParquetWriter::new(std::fs::File::create(&path).expect("created")).finish(&mut table).expect("written");
    let open = |column| Corpus::open(&[path.display().to_string()], column).expect("opened");
    assert_eq!(documents(&open(Some("body"))).expect("read"), ["one", "two"]);
    for (column, part) in [(None, "no column \"text\" (it has: body, n)"), (Some("n"), "is no text")] {
        let error = documents(&open(column)).expect_err("refused").to_string();
        assert!(error.contains("a.parquet") && error.contains(part), "{error}");
    }
}
