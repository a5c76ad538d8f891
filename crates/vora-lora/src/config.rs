//! Which linears get an adapter, and of what rank.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::acts_on::ActsOn;
use crate::pattern::matches_end;

/// The keys under `lora:` of a run file, spelled as the published VoRA recipes spell them; the last three as PEFT does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// How many layers get adapters, counted from the first, or `all` ([`ALL_LAYERS`]).
    #[serde(default = "all_layers", with = "layers")]
    pub layers: i64,
    /// The rank: rows of `A`, columns of `B`.
    pub r: i64,
    /// What `B A` is multiplied with, times `r`; absent: [`LoraConfig::scaling`] is 1, as in VoRA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Modules that get an adapter: a whole path or its last parts, `q_proj` or `self_attn.q_proj`, as in PEFT.
    #[serde(default = "every_linear")]
    pub target_modules: Vec<String>,
    /// Other ranks than `r`: by a path's last parts, or a regular expression for them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, i64>,
    /// Other values than `lora_alpha`, by the same.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Whether the scaling is alpha over the root of the rank (rank-stabilised LoRA, arXiv 2312.03732).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_rslora: bool,
    /// The tokens that they are trained through: `all`, those of documents `with_image`, or `image_tokens` alone.
    #[serde(default, skip_serializing_if = "is_all")]
    pub acts_on: ActsOn,
    /// The tokens that they act on once the trained folder is opened to answer; absent: those of `acts_on`. What was
    /// trained through `all` may answer `with_image`: a prompt without a picture then meets the untouched LLM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers_on: Option<ActsOn>,
}

/// Whether the rule is the one that needs no word.
fn is_all(acts_on: &ActsOn) -> bool {
    *acts_on == ActsOn::All
}

/// Rank and scaling of one linear's adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Rank {
    /// Rows of `A`, columns of `B`.
    pub r: i64,
    /// What PEFT's file says of it.
    pub lora_alpha: f64,
    /// What `B A` is multiplied with.
    pub scaling: f64,
}

impl Rank {
    /// Alpha over the rank, or over its root; an absent alpha is one that makes the scaling 1.
    pub(crate) fn new(r: i64, lora_alpha: Option<f64>, use_rslora: bool) -> Self {
        let over = if use_rslora { (r as f64).sqrt() } else { r as f64 };
        let lora_alpha = lora_alpha.unwrap_or(over);
        Self { r, lora_alpha, scaling: lora_alpha / over }
    }
}

/// As many layers as the model has: [`LoraConfig::over`] says how many those are.
pub const ALL_LAYERS: i64 = i64::MAX;

/// `all`
fn all_layers() -> i64 {
    ALL_LAYERS
}

/// A number of layers, or the published code's word for every one.
mod layers {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::ALL_LAYERS;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Layers {
        Number(i64),
        Word(String),
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        match Layers::deserialize(deserializer) {
            Ok(Layers::Number(layers)) => Ok(layers),
            Ok(Layers::Word(word)) if word.eq_ignore_ascii_case("all") => Ok(ALL_LAYERS),
            _ => Err(D::Error::custom("`layers` is neither a number of layers nor `all`")),
        }
    }

    pub(super) fn serialize<S: Serializer>(layers: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        if *layers == ALL_LAYERS { serializer.serialize_str("all") } else { serializer.serialize_i64(*layers) }
    }
}

/// The seven linears of a Llama block, as VoRA adapts them.
fn every_linear() -> Vec<String> {
    let (attention, mlp) = (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]);
    let attention = attention.map(|name| format!("self_attn.{name}"));
    attention.into_iter().chain(mlp.map(|name| format!("mlp.{name}"))).collect()
}

impl LoraConfig {
    /// Rank `r` on the seven linears of the first `layers` blocks, scaling 1.
    pub fn new(r: i64, layers: i64) -> Self {
        Self {
            layers,
            r,
            lora_alpha: None,
            target_modules: every_linear(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_rslora: false,
            acts_on: ActsOn::All,
            answers_on: None,
        }
    }

    /// Rank `r` on these modules of every layer, and on those that lie in none; scaling 1. For models other than a Llama.
    pub fn of_modules(r: i64, target_modules: impl IntoIterator<Item: Into<String>>) -> Self {
        let target_modules = target_modules.into_iter().map(Into::into).collect();
        Self { target_modules, ..Self::new(r, ALL_LAYERS) }
    }

    /// The tokens that they act on once the trained folder is opened to answer.
    pub fn answers_on(&self) -> ActsOn {
        self.answers_on.unwrap_or(self.acts_on)
    }

    /// The same over a model of so many layers: [`ALL_LAYERS`] become a number.
    #[must_use]
    pub fn over(&self, num_hidden_layers: usize) -> Self {
        let layers = if self.layers == ALL_LAYERS { num_hidden_layers as i64 } else { self.layers };
        Self { layers, ..self.clone() }
    }

    /// Whether this and another ask for the same adapters: the order of targets says nothing, nor does what they act on.
    pub fn is_same(&self, other: &Self) -> bool {
        let sorted = |config: &Self| {
            let mut config = Self { acts_on: ActsOn::All, answers_on: None, ..config.clone() };
            config.target_modules.sort();
            config
        };
        sorted(self) == sorted(other)
    }

    /// What `B A` is multiplied with where no pattern says otherwise: `lora_alpha / r`, or 1.
    pub fn scaling(&self) -> f64 {
        Rank::new(self.r, self.lora_alpha, self.use_rslora).scaling
    }

    /// Rank and scaling of the module at `path`.
    ///
    /// # Errors
    /// Where two patterns match it and disagree: a map has no order that could decide.
    pub fn rank(&self, path: &str) -> Result<Rank> {
        let r = agreed("lora.rank_pattern", &self.rank_pattern, path)?.unwrap_or(self.r);
        let lora_alpha = agreed("lora.alpha_pattern", &self.alpha_pattern, path)?.or(self.lora_alpha);
        Ok(Rank::new(r, lora_alpha, self.use_rslora))
    }

    /// Checks every key's range.
    ///
    /// # Errors
    /// Names the first key that is out of it.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.r >= 1, "lora.r is {}, it must be at least 1", self.r);
        ensure!(self.layers >= 1, "lora.layers is {}, it must be at least 1", self.layers);
        if let Some(alpha) = self.lora_alpha {
            ensure!(alpha.is_finite() && alpha > 0.0, "lora.lora_alpha is {alpha}, it must be above 0");
        }
        ensure!(!self.target_modules.is_empty(), "lora.target_modules is empty, it must name at least one module");
        let empty = self.target_modules.iter().any(|target| target.trim().is_empty());
        ensure!(!empty, "lora.target_modules has an empty name");
        for (pattern, r) in &self.rank_pattern {
            ensure!(*r >= 1, "lora.rank_pattern: `{pattern}` is {r}, it must be at least 1");
        }
        for (pattern, alpha) in &self.alpha_pattern {
            ensure!(
                alpha.is_finite() && *alpha > 0.0,
                "lora.alpha_pattern: `{pattern}` is {alpha}, it must be above 0"
            );
        }
        for (key, pattern) in self.patterns() {
            // A path has more before it in one file than in another.
            ensure!(
                !pattern.is_empty() && !pattern.contains('^'),
                "{key}: `{pattern}` is matched with the end of a path, it cannot ask for its beginning"
            );
            matches_end(pattern, "").context(key)?;
        }
        ensure!(
            !self.use_rslora || self.lora_alpha.is_some(),
            "lora.use_rslora is true, which scales lora.lora_alpha, but that is absent"
        );
        self.acts_on.check_opened(self.answers_on()).context("lora.answers_on")?;
        Ok(())
    }

    /// Every pattern, with the key that it stands under.
    pub(crate) fn patterns(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let ranks = self.rank_pattern.keys().map(|pattern| ("lora.rank_pattern", pattern.as_str()));
        ranks.chain(self.alpha_pattern.keys().map(|pattern| ("lora.alpha_pattern", pattern.as_str())))
    }

    /// Whether the module at `path` may carry an adapter, for the layer that it lies in: one of the first ones, all of them,
    /// or any where a target is its whole path.
    pub(crate) fn reaches(&self, path: &str) -> bool {
        let (layer, _) = in_layer(path);
        self.layers == ALL_LAYERS
            || layer.is_some_and(|layer| layer < self.layers)
            || self.target_modules.iter().any(|target| target == path)
    }

    /// Whether the module at `path` is a target: the path equals one or ends with `.` and one. Which layer it lies in
    /// is not asked.
    pub fn targets(&self, path: &str) -> bool {
        self.target_modules.iter().any(|target| names(target, path))
    }
}

/// The value that every pattern which matches `path` has, if there is one.
fn agreed<T: Copy + PartialEq>(key: &'static str, patterns: &BTreeMap<String, T>, path: &str) -> Result<Option<T>> {
    let mut found: Option<(&str, T)> = None;
    for (pattern, &value) in patterns {
        if matches_end(pattern, path).context(key)? {
            match found {
                Some((other, agreed)) if agreed != value => {
                    bail!("{key}: `{other}` and `{pattern}` both match {path} and have different values")
                }
                _ => found = Some((pattern, value)),
            }
        }
    }
    Ok(found.map(|(_, value)| value))
}

/// The layer that a module lies in, the first number in its path, and its path within it; all of it where it lies in none.
pub fn in_layer(path: &str) -> (Option<i64>, &str) {
    let mut start = 0;
    for part in path.split('.') {
        start += part.len() + 1;
        if let (true, Ok(layer)) = (part.bytes().all(|byte| byte.is_ascii_digit()), part.parse()) {
            return (Some(layer), path.get(start..).unwrap_or_default());
        }
    }
    (None, path)
}

/// Whether `target` is the whole `path` or its last parts.
pub(crate) fn names(target: &str, path: &str) -> bool {
    path.strip_suffix(target).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> serde_json::Result<LoraConfig> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_published_recipe_parses() {
        let config =
            parse(r#"{"layers": 24, "r": 1024, "target_modules": ["self_attn.q_proj", "mlp.up_proj"]}"#).unwrap();
        config.validate().unwrap();
        assert_eq!((config.layers, config.r, config.scaling()), (24, 1024, 1.0));
        assert_eq!(parse(r#"{"layers": 2, "r": 4}"#).unwrap(), LoraConfig::new(4, 2));
        assert_eq!(parse(r#"{"layers": 2, "r": 4, "lora_alpha": 8}"#).unwrap().scaling(), 2.0);
        // What says nothing new is not written.
        let written = serde_json::to_value(LoraConfig::new(4, 2)).unwrap();
        assert_eq!(written.as_object().unwrap().len(), 3, "{written}");
    }

    #[test]
    fn all_layers_are_as_many_as_the_model_has() {
        for json in [r#"{"layers": "all", "r": 4}"#, r#"{"layers": "ALL", "r": 4}"#, r#"{"r": 4}"#] {
            let config = parse(json).unwrap();
            config.validate().unwrap();
            assert_eq!((config.layers, config.over(7).layers), (ALL_LAYERS, 7));
            assert_eq!(serde_json::to_value(&config).unwrap()["layers"], "all");
        }
        assert_eq!(parse(r#"{"layers": 2, "r": 4}"#).unwrap().over(7).layers, 2);
        for wrong in [r#"{"layers": "some", "r": 4}"#, r#"{"layers": 1.5, "r": 4}"#] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("`layers` is neither a number of layers nor `all`"), "{error}");
        }
    }

    #[test]
    fn modules_have_ranks_of_their_own() {
        let config = parse(
            r#"{"layers": 2, "r": 4, "lora_alpha": 8, "rank_pattern": {"mlp.up_proj": 16, "0.self_attn.[qk]_proj": 1},
                "alpha_pattern": {"up_proj": 4}}"#,
        )
        .unwrap();
        config.validate().unwrap();
        let rank = |path: &str| config.rank(path).map(|rank| (rank.r, rank.lora_alpha, rank.scaling)).unwrap();
        assert_eq!(rank("llm.model.layers.1.mlp.up_proj"), (16, 4.0, 0.25));
        assert_eq!(rank("llm.model.layers.0.self_attn.k_proj"), (1, 8.0, 8.0));
        assert_eq!(rank("llm.model.layers.1.self_attn.k_proj"), (4, 8.0, 2.0));
        let stable = LoraConfig { use_rslora: true, ..config.clone() };
        assert_eq!(stable.rank("mlp.up_proj").unwrap(), Rank { r: 16, lora_alpha: 4.0, scaling: 1.0 });
        assert_eq!(stable.scaling(), 4.0);
        // Without an alpha every scaling is 1, whatever the rank.
        assert_eq!(LoraConfig { lora_alpha: None, ..config.clone() }.rank("0.self_attn.q_proj").unwrap().scaling, 1.0);

        let mut both = config;
        both.rank_pattern.insert("up_proj".into(), 16);
        assert_eq!(both.rank("x.mlp.up_proj").unwrap().r, 16);
        both.rank_pattern.insert("up_proj".into(), 2);
        let error = both.rank("x.mlp.up_proj").unwrap_err().to_string();
        let expected =
            "lora.rank_pattern: `mlp.up_proj` and `up_proj` both match x.mlp.up_proj and have different values";
        assert_eq!(error, expected);
    }

    #[test]
    fn targets_match_whole_parts_from_the_end() {
        let config =
            LoraConfig { target_modules: vec!["q_proj".into(), "mlp.up_proj".into()], ..LoraConfig::new(1, 2) };
        for path in ["q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "mlp.up_proj", "x.mlp.up_proj"] {
            assert!(config.targets(path), "{path}");
        }
        for path in ["eq_proj", "self_attn.eq_proj", "q_proj.base", "up_proj", "xmlp.up_proj"] {
            assert!(!config.targets(path), "{path}");
        }
    }

    #[test]
    fn errors_name_the_key() {
        let good = LoraConfig::new(4, 2);
        let ranks = |pattern: &str, r| BTreeMap::from([(pattern.to_owned(), r)]);
        let cases = [
            (LoraConfig { r: 0, ..good.clone() }, "lora.r is 0, it must be at least 1"),
            (LoraConfig { layers: -1, ..good.clone() }, "lora.layers is -1, it must be at least 1"),
            (LoraConfig { lora_alpha: Some(0.0), ..good.clone() }, "lora.lora_alpha is 0"),
            (LoraConfig { target_modules: vec![], ..good.clone() }, "lora.target_modules is empty"),
            (LoraConfig { rank_pattern: ranks("q", 0), ..good.clone() }, "lora.rank_pattern: `q` is 0"),
            (LoraConfig { rank_pattern: ranks("^q", 1), ..good.clone() }, "`^q` is matched with the end of a path"),
            (LoraConfig { rank_pattern: ranks("(q", 1), ..good.clone() }, "lora.rank_pattern: `(q` is no regular"),
            (
                LoraConfig { alpha_pattern: [("q".into(), -1.0)].into(), ..good.clone() },
                "`q` is -1, it must be above 0",
            ),
            (LoraConfig { use_rslora: true, ..good.clone() }, "lora.lora_alpha, but that is absent"),
            (
                LoraConfig { acts_on: ActsOn::WithImage, answers_on: Some(ActsOn::All), ..good },
                "lora.answers_on: adapters that were trained through `with_image` cannot act on `all`",
            ),
        ];
        for (config, expected) in cases {
            let error = format!("{:#}", config.validate().unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        let error = parse(r#"{"layers": 2, "rank": 4}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `rank`, expected one of"), "{error}");
        // PEFT's dropout of what goes into an adapter: not done here, and not taken silently.
        let error = parse(r#"{"layers": 2, "r": 4, "lora_dropout": 0.1}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `lora_dropout`"), "{error}");
    }
}
