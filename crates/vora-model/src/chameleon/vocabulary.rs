//! Image codes <-> token ids, by the names of Chameleon's image tokens (Hugging Face's
//! `ChameleonImageVocabularyMapping`).

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

/// Which token stands for which image code, from the `vocabulary_map` of Chameleon's `config.json`.
///
/// The token of code 305 is called `IMGIMGDAFZ`: the letters A to J are the digits 0 to 9.
#[derive(Debug)]
pub struct VocabularyMapping {
    image_token_id: i64,
    image_token_ids: Vec<i64>, // sorted
    codes: Tensor,             // [codes], the code of each of them
    img2bpe: Tensor,           // [codes], the id of each code
}

impl VocabularyMapping {
    /// From an object of token names and ids.
    ///
    /// # Errors
    /// Where an image token's name or id is malformed, two share a code or an id, the codes are not 0, 1, 2, .., or
    /// `<image>` is missing.
    pub fn new(vocabulary_map: &Map<String, Value>) -> Result<Self> {
        let id = |name: &str, id: &Value| {
            let valid = id.as_i64().filter(|id| *id >= 0);
            valid.with_context(|| format!("token `{name}` of vocabulary_map has the id {id}, ids are whole numbers"))
        };
        let image = vocabulary_map.get("<image>").context("vocabulary_map has no token `<image>`")?;
        let mut tokens = Vec::new(); // code, id, name
        for (name, value) in vocabulary_map {
            if let Some(code) = code_of(name)? {
                tokens.push((code, id(name, value)?, name.as_str()));
            }
        }
        ensure!(!tokens.is_empty(), "vocabulary_map has no image tokens, whose names start with `IMGIMG`");
        tokens.sort_unstable();
        for (expected, (code, _, name)) in (0u32..).zip(&tokens) {
            ensure!(
                *code >= i64::from(expected),
                "image token `{name}` of vocabulary_map has the code of another, {code}"
            );
            ensure!(
                *code == i64::from(expected),
                "vocabulary_map has {} image tokens, but none for code {expected}, which would be `{}`",
                tokens.len(),
                image_token_name(expected)
            );
        }
        let img2bpe: Vec<i64> = tokens.iter().map(|(_, id, _)| *id).collect();
        tokens.sort_unstable_by_key(|(_, id, _)| *id);
        for two in tokens.windows(2) {
            let [(_, id, name), (_, next, other)] = two else { continue };
            ensure!(id != next, "image tokens `{name}` and `{other}` of vocabulary_map have the same id, {id}");
        }
        Ok(Self {
            image_token_id: id("<image>", image)?,
            image_token_ids: tokens.iter().map(|(_, id, _)| *id).collect(),
            codes: Tensor::from_slice(&tokens.iter().map(|(code, _, _)| *code).collect::<Vec<_>>()),
            img2bpe: Tensor::from_slice(&img2bpe),
        })
    }

    /// The id of `<image>`, which holds a picture's places in a prompt.
    pub fn image_token_id(&self) -> i64 {
        self.image_token_id
    }

    /// The ids of all image tokens, sorted.
    pub fn image_token_ids(&self) -> &[i64] {
        &self.image_token_ids
    }

    /// The token ids of image codes, of any shape.
    ///
    /// # Errors
    /// Where a code has no token.
    pub fn img2bpe(&self, codes: &Tensor) -> Result<Tensor> {
        let on_cpu = codes.to_device(Device::Cpu).to_kind(Kind::Int64);
        let num_codes = self.img2bpe.size()[0];
        if let Some(code) = first_where(&on_cpu, &on_cpu.lt(0).logical_or(&on_cpu.ge(num_codes))) {
            bail!("image code {code} has no token, the vocabulary has 0 to {}", num_codes - 1);
        }
        Ok(self.img2bpe.take(&on_cpu).to_device(codes.device()))
    }

    /// The image codes of token ids, of any shape.
    ///
    /// # Errors
    /// Where an id is no image token's.
    pub fn bpe2img(&self, ids: &Tensor) -> Result<Tensor> {
        let on_cpu = ids.to_device(Device::Cpu).to_kind(Kind::Int64).contiguous();
        let image_token_ids = Tensor::from_slice(&self.image_token_ids);
        let places = on_cpu.searchsorted(&image_token_ids, false, false, "left", None::<&Tensor>);
        let places = places.clamp_max(image_token_ids.size()[0] - 1);
        if let Some(id) = first_where(&on_cpu, &image_token_ids.take(&places).not_equal_tensor(&on_cpu)) {
            bail!("token {id} is not an image token");
        }
        Ok(self.codes.take(&places).to_device(ids.device()))
    }
}

/// The name of an image code's token: 305 -> `IMGIMGDAFZ`.
pub fn image_token_name(code: u32) -> String {
    let letters: String = code.to_string().bytes().map(|digit| char::from(digit - b'0' + b'A')).collect();
    format!("IMGIMG{letters}Z")
}

/// The code in an image token's name, nothing for other tokens.
fn code_of(name: &str) -> Result<Option<i64>> {
    let Some(rest) = name.strip_prefix("IMGIMG") else { return Ok(None) };
    let letters = rest.strip_suffix('Z').unwrap_or_default();
    ensure!(
        (1..=18).contains(&letters.len()) && letters.bytes().all(|letter| (b'A'..=b'J').contains(&letter)),
        "image token `{name}` of vocabulary_map is malformed: after IMGIMG come digits as letters A to J, then Z"
    );
    Ok(Some(letters.bytes().fold(0, |code, letter| 10 * code + i64::from(letter - b'A'))))
}

/// The first element of `values` where `mask` is true.
fn first_where(values: &Tensor, mask: &Tensor) -> Option<i64> {
    let found = values.masked_select(mask);
    (found.numel() > 0).then(|| found.int64_value(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn golden() -> Value {
        let path = fixtures::root().join("golden/vq_vocabulary.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn matches_reference() {
        let golden = golden();
        let mapping = VocabularyMapping::new(golden["vocabulary_map"].as_object().unwrap()).unwrap();
        let list = |key: &str| serde_json::from_value::<Vec<i64>>(golden[key].clone()).unwrap();
        assert_eq!(Some(mapping.image_token_id()), golden["image_token_id"].as_i64());
        assert_eq!(mapping.image_token_ids(), list("image_tokens"));
        let (codes, ids) = (Tensor::arange(123, (Kind::Int64, Device::Cpu)), Tensor::from_slice(&list("img2bpe")));
        assert!(mapping.img2bpe(&codes).unwrap().equal(&ids));
        assert!(mapping.bpe2img(&ids.view([3, 41])).unwrap().equal(&codes.view([3, 41])));
        assert_eq!(mapping.img2bpe(&codes.narrow(0, 0, 0)).unwrap().size(), [0]);
    }

    #[test]
    fn what_has_no_counterpart_is_told() {
        let golden = golden();
        let mapping = VocabularyMapping::new(golden["vocabulary_map"].as_object().unwrap()).unwrap();
        let error = |result: Result<Tensor>| result.unwrap_err().to_string();
        let tensor = |values: &[i64]| Tensor::from_slice(values);
        assert_eq!(
            error(mapping.img2bpe(&tensor(&[0, 123]))),
            "image code 123 has no token, the vocabulary has 0 to 122"
        );
        assert!(error(mapping.img2bpe(&tensor(&[-1]))).contains("image code -1"));
        let known = mapping.image_token_ids()[0];
        assert_eq!(error(mapping.bpe2img(&tensor(&[known, 5]))), "token 5 is not an image token");
        assert_eq!(error(mapping.bpe2img(&tensor(&[100_000]))), "token 100000 is not an image token");
    }

    #[test]
    fn malformed_maps_are_refused_by_name() {
        let refuse = |map: Value| VocabularyMapping::new(map.as_object().unwrap()).unwrap_err().to_string();
        assert_eq!(refuse(json!({"IMGIMGAZ": 4})), "vocabulary_map has no token `<image>`");
        assert!(refuse(json!({"<image>": 1, "a": 4})).contains("no image tokens"));
        for name in ["IMGIMGKZ", "IMGIMGZ", "IMGIMGA", "IMGIMG1Z", "IMGIMGäZ", "IMGIMGJJJJJJJJJJJJJJJJJJJZ"] {
            assert!(refuse(json!({"<image>": 1, name: 4})).contains(&format!("`{name}`")), "{name}");
        }
        let error = refuse(json!({"<image>": 1, "IMGIMGAZ": 4, "IMGIMGCZ": 5}));
        assert!(error.contains("2 image tokens, but none for code 1, which would be `IMGIMGBZ`"), "{error}");
        let error = refuse(json!({"<image>": 1, "IMGIMGAZ": 4, "IMGIMGAAZ": 5}));
        assert!(error.contains("has the code of another, 0"), "{error}");
        let error = refuse(json!({"<image>": 1, "IMGIMGAZ": 4, "IMGIMGBZ": 4}));
        assert_eq!(error, "image tokens `IMGIMGAZ` and `IMGIMGBZ` of vocabulary_map have the same id, 4");
        assert!(
            refuse(json!({"<image>": 1, "IMGIMGAZ": "4"})).contains("`IMGIMGAZ` of vocabulary_map has the id \"4\"")
        );
        assert_eq!(code_of(&image_token_name(8191)).unwrap(), Some(8191));
    }
}
