//! Golden scores, and comparisons with them.

use super::TokenizedCaption;

/// What the published packages make of the strings in `golden/scores.json`.
pub(super) fn golden() -> serde_json::Value {
    let path = fixtures::root().join("golden/scores.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The captions of `golden/scores.json` and what they score, `(captions, expected)` for each set.
pub(super) fn golden_captions() -> Vec<(Vec<TokenizedCaption>, serde_json::Value)> {
    let sets = golden()["captions"].as_array().unwrap().clone();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let captions = |set: &serde_json::Value| {
        let pairs = set["candidates"].as_array().unwrap().iter().zip(set["references"].as_array().unwrap());
        pairs
            .map(|(candidate, references)| TokenizedCaption {
                candidate: text(candidate),
                references: references.as_array().unwrap().iter().map(text).collect(),
            })
            .collect()
    };
    sets.into_iter().map(|set| (captions(&set), set)).collect()
}

pub(super) fn assert_near(found: f64, expected: &serde_json::Value) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
}
