//! How each parameter of a run learns, by its name: its rate, and what AdamW is told for all of them.

use std::collections::BTreeMap;

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

/// What AdamW is told once for a run.
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

#[cfg(test)]
mod tests {
    use super::*;

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
