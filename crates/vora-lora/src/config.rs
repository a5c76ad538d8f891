//! Which linears get an adapter, and of what rank.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The keys under `lora:` of a run file, spelled as the published VoRA recipes spell them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// How many layers get adapters, counted from the first.
    pub layers: i64,
    /// The rank: rows of `A`, columns of `B`.
    pub r: i64,
    /// What `B A` is multiplied with, times `r`; absent: [`LoraConfig::scaling`] is 1, as in VoRA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Modules that get an adapter: a whole path or its last parts, `q_proj` or `self_attn.q_proj`, as in PEFT.
    #[serde(default = "every_linear")]
    pub target_modules: Vec<String>,
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
        Self { layers, r, lora_alpha: None, target_modules: every_linear() }
    }

    /// What `B A` is multiplied with: `lora_alpha / r`, or 1.
    pub fn scaling(&self) -> f64 {
        self.lora_alpha.map_or(1.0, |alpha| alpha / self.r as f64)
    }

    /// An error that names the first key out of its range.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.r >= 1, "lora.r is {}, it must be at least 1", self.r);
        ensure!(self.layers >= 1, "lora.layers is {}, it must be at least 1", self.layers);
        if let Some(alpha) = self.lora_alpha {
            ensure!(alpha.is_finite() && alpha > 0.0, "lora.lora_alpha is {alpha}, it must be above 0");
        }
        ensure!(!self.target_modules.is_empty(), "lora.target_modules is empty, it must name at least one module");
        let empty = self.target_modules.iter().any(|target| target.trim().is_empty());
        ensure!(!empty, "lora.target_modules has an empty name");
        Ok(())
    }

    /// Whether the module at `path` is a target: the path equals one or ends with `.` and one. Which layer it lies in
    /// is not asked.
    pub fn targets(&self, path: &str) -> bool {
        self.target_modules.iter().any(|target| names(target, path))
    }
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
        let cases = [
            (LoraConfig { r: 0, ..good.clone() }, "lora.r is 0, it must be at least 1"),
            (LoraConfig { layers: -1, ..good.clone() }, "lora.layers is -1, it must be at least 1"),
            (LoraConfig { lora_alpha: Some(0.0), ..good.clone() }, "lora.lora_alpha is 0"),
            (LoraConfig { target_modules: vec![], ..good }, "lora.target_modules is empty"),
        ];
        for (config, expected) in cases {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = parse(r#"{"layers": 2, "rank": 4}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `rank`, expected one of"), "{error}");
    }
}
