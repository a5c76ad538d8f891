//! The BPE of SentencePiece, which Llama 2, Vicuna and the first Mistrals have: pieces with scores in GGUF, pieces with merges in HF's
//! `tokenizer.json`. Of all neighbours that together are a piece, those are joined first whose piece scores best.

use std::cmp::Ordering;
use std::collections::HashMap;

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value, json};

/// What stands for a space in a piece.
const SPACE: &str = "▁";

/// What a text becomes before it is cut into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// A space goes before every text, after a special token too: `add_space_prefix` of GGUF.
    Always,
    /// A space goes before a text, but not after a special token.
    First,
    Never,
}

/// The parts of `tokenizer.json` that such a file has in place of a byte-level BPE's: normalizer and decoder, as HF's converter wrote
/// them for Llama 2.
pub(crate) fn normalizer_and_decoder(adds_prefix: bool) -> (Value, Value) {
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if adds_prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    (json!({ "type": "Sequence", "normalizers": normalizers }), json!({ "type": "Sequence", "decoders": decoders }))
}

/// Whether and where a space goes before a text, by normalizer and pre-tokenizer of `tokenizer.json`.
///
/// # Errors
/// Where they do anything else.
pub(crate) fn prefix(tokenizer: &Value) -> Result<Prefix> {
    let steps = |part: &str, steps: &str| match &tokenizer[part] {
        Value::Null => Vec::new(),
        part if part["type"] == "Sequence" => part[steps].as_array().cloned().unwrap_or_default(),
        part => vec![part.clone()],
    };
    let (normalizers, pre_tokenizers) = (steps("normalizer", "normalizers"), steps("pre_tokenizer", "pretokenizers"));
    let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == SPACE;
    let replaces =
        |step: &Value| step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == SPACE;
    let marks = |step: &Value| step["type"] == "Metaspace" && step["replacement"] == SPACE && step["split"] == false;
    Ok(match (&normalizers[..], &pre_tokenizers[..]) {
        ([first, second], []) if prepends(first) && replaces(second) => Prefix::Always,
        ([only], []) if replaces(only) => Prefix::Never,
        ([], [only]) if marks(only) => match only["prepend_scheme"].as_str() {
            Some("always") | None => Prefix::Always,
            Some("first") => Prefix::First,
            _ => Prefix::Never,
        },
        _ => bail!(
            "normalizer and pre_tokenizer do something else than to write spaces as {SPACE}, all that SentencePiece does in GGUF"
        ),
    })
}

/// HF's `merges` of pieces by their scores: every two pieces that together are a third, the best score first.
pub(crate) fn merges(pieces: &[(&str, f32)]) -> Vec<String> {
    let ids: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, (piece, _))| (*piece, id)).collect();
    let mut found: Vec<(f32, usize, &str, &str)> = Vec::new();
    for &(piece, score) in pieces {
        found
            .extend(splits(piece, |part| ids.contains_key(part)).map(|(left, right)| (score, ids[piece], left, right)));
    }
    found.sort_by(|a, b| {
        let by_score = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
        by_score.then(a.1.cmp(&b.1)).then(b.2.len().cmp(&a.2.len()))
    });
    found.into_iter().map(|(_, _, left, right)| format!("{left} {right}")).collect()
}

/// The score of every piece that a text can become, so that [`merges`] of them join the same neighbours: pieces that merges make in the order
/// in which they come, those of one character after them, as SentencePiece has them.
///
/// # Errors
/// Names a piece whose merges no score tells.
pub(crate) fn scores<'a>(merges: &[(&'a str, &'a str)], pieces: &[&'a str]) -> Result<HashMap<&'a str, f32>> {
    let known: HashMap<&str, ()> = pieces.iter().map(|&piece| (piece, ())).collect();
    let mut joined: HashMap<String, Vec<&str>> = HashMap::new(); // what each piece is made of: the left of every merge
    let mut order = Vec::new();
    for (left, right) in merges {
        let piece = format!("{left}{right}");
        if !known.contains_key(piece.as_str()) {
            continue;
        }
        ensure!(
            order.last() == Some(&piece) || !joined.contains_key(&piece),
            "`merges` come back to the piece `{piece}` after another: SentencePiece's scores have one place for each"
        );
        let lefts = joined.entry(piece.clone()).or_default();
        if lefts.is_empty() {
            order.push(piece);
        }
        lefts.push(left);
    }
    let ranks: HashMap<&str, usize> = order.iter().enumerate().map(|(rank, piece)| (piece.as_str(), rank)).collect();
    let mut last = order.len();
    let mut scores = HashMap::new();
    for &piece in pieces {
        let lefts = joined.get(piece).map_or(&[][..], Vec::as_slice);
        if let Some((left, right)) =
            splits(piece, |part| known.contains_key(part)).find(|(left, _)| !lefts.contains(left))
        {
            bail!("`merges` do not join `{left}` and `{right}` to the piece `{piece}`, as SentencePiece would");
        }
        let rank = ranks.get(piece).copied().unwrap_or_else(|| {
            last += 1;
            last - 1
        });
        scores.insert(piece, -(rank as f32));
    }
    Ok(scores)
}

/// The ways to cut a piece in two that are known.
fn splits(piece: &str, is_known: impl Fn(&str) -> bool) -> impl Iterator<Item = (&str, &str)> {
    let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
    cuts.filter(move |(left, right)| is_known(left) && is_known(right))
}

/// `model` of `tokenizer.json`.
pub(crate) fn model(vocab: Map<String, Value>, merges: Vec<String>, unknown: Option<&str>) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "vocab": vocab,
        "merges": merges,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(merges: &[String]) -> Vec<(&str, &str)> {
        merges.iter().map(|merge| merge.split_once(' ').unwrap()).collect()
    }

    #[test]
    fn merges_become_scores_and_scores_the_same_merges() {
        let pieces = [
            ("▁th", 0.0),
            ("he", -1.0),
            ("▁the", -2.0),
            ("▁", -3.0),
            ("t", -4.0),
            ("h", -5.0),
            ("e", -6.0),
            ("▁t", -7.0),
        ];
        let merges = merges(&pieces);
        assert_eq!(merges, ["▁t h", "h e", "▁th e", "▁t he", "▁ t"]);
        let names = pieces.map(|(piece, _)| piece);
        let scores = scores(&pairs(&merges), &names).unwrap();
        assert_eq!(names.map(|piece| scores[piece]), [0.0, -1.0, -2.0, -4.0, -5.0, -6.0, -7.0, -3.0]);
    }

    #[test]
    fn merges_that_no_scores_tell_are_named() {
        let told = |merges: &[(&str, &str)], pieces: &[&str]| scores(merges, pieces).unwrap_err().to_string();
        assert_eq!(
            told(&[("a", "b")], &["a", "b", "c", "ab", "abc"]),
            "`merges` do not join `ab` and `c` to the piece `abc`, as SentencePiece would"
        );
        let back = [("a", "bc"), ("a", "b"), ("b", "c"), ("ab", "c")];
        assert!(told(&back, &["a", "b", "c", "ab", "bc", "abc"]).starts_with("`merges` come back to the piece `abc`"));
    }

    #[test]
    fn the_space_before_a_text_is_found_in_either_way_of_writing_it() {
        let metaspace = |scheme: &str| json!({ "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false });
        for (tokenizer, expected) in [
            (json!({ "normalizer": normalizer_and_decoder(true).0 }), Prefix::Always),
            (json!({ "normalizer": normalizer_and_decoder(false).0, "pre_tokenizer": null }), Prefix::Never),
            (json!({ "normalizer": null, "pre_tokenizer": metaspace("always") }), Prefix::Always),
            (json!({ "pre_tokenizer": metaspace("first") }), Prefix::First),
            (json!({ "pre_tokenizer": metaspace("never") }), Prefix::Never),
        ] {
            assert_eq!(prefix(&tokenizer).unwrap(), expected, "{tokenizer}");
        }
        let mut words = metaspace("always");
        words["split"] = true.into();
        for other in [json!({ "normalizer": { "type": "NFKC" } }), json!({ "pre_tokenizer": words })] {
            assert!(prefix(&other).unwrap_err().to_string().starts_with("normalizer and pre_tokenizer do something"));
        }
    }
}
