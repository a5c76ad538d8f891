//! How each parameter of a run learns, by its name: its rate, and what AdamW is told for all of them.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Learning rates of some parameters, by a part of their names on disk (`lora_B`, `vision_embedding.patchifier`); of
/// several parts that fit the longest counts, and a parameter that none fits takes the run's `learning_rate`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LearningRates(pub BTreeMap<String, f64>);

impl LearningRates {
    /// Those of parts for which `drop` is false.
    pub fn without(&self, drop: impl Fn(&str) -> bool) -> Self {
        Self(self.0.iter().filter(|(part, _)| !drop(part)).map(|(part, rate)| (part.clone(), *rate)).collect())
    }

    /// The rate of the parameter `name`; `default` where no part fits.
    pub fn of(&self, name: &str, default: f64) -> f64 {
        let fitting = self.0.iter().filter(|(part, _)| has_part(name, part));
        fitting.max_by_key(|(part, _)| part.len()).map_or(default, |(_, rate)| *rate)
    }

    /// The first part that none of `names` has.
    pub fn part_of_none<'n>(&self, names: impl Iterator<Item = &'n str> + Clone) -> Option<&str> {
        self.0.keys().map(String::as_str).find(|part| !names.clone().any(|name| has_part(name, part)))
    }
}

/// Whether `part` is one or several whole steps of the dotted `name`.
fn has_part(name: &str, part: &str) -> bool {
    format!(".{name}.").contains(&format!(".{part}."))
}

/// What AdamW is told once for a run; the default is that of a run file.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimConfig {
    /// Learning rate at a schedule factor of 1.
    pub learning_rate: f64,
    /// Groups that learn at another rate.
    pub learning_rates: LearningRates,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled decay of matrices; biases, norms and position tables are left alone.
    pub weight_decay: f64,
    /// The gradient is scaled down to this global 2-norm; 0 leaves it as it is.
    pub max_grad_norm: f64,
}

pub(crate) fn learning_rate() -> f64 {
    2e-4
}
pub(crate) fn adam_beta1() -> f64 {
    0.9
}
pub(crate) fn adam_beta2() -> f64 {
    0.999
}
pub(crate) fn adam_epsilon() -> f64 {
    1e-8
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: learning_rate(),
            learning_rates: LearningRates::default(),
            beta1: adam_beta1(),
            beta2: adam_beta2(),
            eps: adam_epsilon(),
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        }
    }
}

impl OptimConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the key, as a run file spells it.
    pub fn validate(&self) -> Result<()> {
        for (part, rate) in &self.learning_rates.0 {
            ensure!(*rate >= 0.0 && rate.is_finite(), "learning_rates.{part} is {rate}, it must be 0 or more");
        }
        let not_negative = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
        ];
        for (key, value) in not_negative {
            ensure!(value >= 0.0 && value.is_finite(), "{key} is {value}, it must be 0 or more");
        }
        for (key, value) in [("adam_beta1", self.beta1), ("adam_beta2", self.beta2)] {
            ensure!((0.0..1.0).contains(&value), "{key} is {value}, it must be at least 0 and below 1");
        }
        ensure!(self.eps > 0.0, "adam_epsilon is {}, it must be above 0", self.eps);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_named_as_in_a_run_file() {
        OptimConfig::default().validate().unwrap();
        let error = |config: OptimConfig| config.validate().unwrap_err().to_string();
        let config = || OptimConfig::default();
        let expected = "adam_beta2 is 1, it must be at least 0 and below 1";
        assert_eq!(error(OptimConfig { beta2: 1.0, ..config() }), expected);
        assert_eq!(error(OptimConfig { eps: 0.0, ..config() }), "adam_epsilon is 0, it must be above 0");
        let learning_rates = LearningRates([("lora_A".to_owned(), f64::NAN)].into());
        let expected = "learning_rates.lora_A is NaN, it must be 0 or more";
        assert_eq!(error(OptimConfig { learning_rates, ..config() }), expected);
    }

    #[test]
    fn names_choose_groups() {
        let rates = [("lora_A", 1.0), ("vision_embedding", 3.0), ("vision_embedding.patchifier.proj", 4.0)];
        let rates = LearningRates(rates.map(|(part, rate)| (part.to_owned(), rate)).into());
        let of = |name| rates.of(name, 9.0);
        assert_eq!(of("llm.model.layers.0.self_attn.q_proj.lora_A.weight"), 1.0);
        assert_eq!(of("llm.model.layers.0.self_attn.q_proj.lora_B.weight"), 9.0);
        assert_eq!(of("vision_embedding.pos_embed"), 3.0);
        assert_eq!(of("vision_embedding.patchifier.proj.bias"), 4.0);
        assert_eq!(of("vision_embedding2.pos_embed"), 9.0);
        let names = ["a.lora_A.weight", "vision_embedding.patchifier.proj.bias"];
        assert_eq!(rates.part_of_none(names.into_iter()), None);
        assert_eq!(rates.part_of_none(["a.lora_A.weight"].into_iter()), Some("vision_embedding"));
        assert_eq!(rates.part_of_none(["a.lora_A2.weight"].into_iter()), Some("lora_A"));
    }
}
