//! How each parameter of a run learns, by its name: its rate, and whether it decays.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::Tensor;
use vora_torch::optim::{Optimizer, OptimizerConfig, Parameter};

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

    fn of(&self, name: &str, default: f64) -> f64 {
        let fitting = self.0.iter().filter(|(part, _)| has_part(name, part));
        fitting.max_by_key(|(part, _)| part.len()).map_or(default, |(_, rate)| *rate)
    }
}

/// Whether `part` is one or several whole steps of the dotted `name`.
fn has_part(name: &str, part: &str) -> bool {
    format!(".{name}.").contains(&format!(".{part}."))
}

/// Whether weight decay draws this parameter to 0: not biases and norms, as in HF's trainer, and no position table.
/// A norm may be a matrix: Chameleon's of q and k has a row a head.
fn decays(name: &str, tensor: &Tensor) -> bool {
    let is_norm = |step: &str| step == "norm" || step.ends_with("_norm") || step.ends_with("layernorm");
    tensor.dim() >= 2 && !name.ends_with("pos_embed") && !name.split('.').any(is_norm)
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

/// The optimizer of a run over `parameters`, f32 leaves by their names on disk.
///
/// # Errors
/// Where there are none, or a rate of its own fits none of them.
pub fn optimizer(parameters: Vec<(String, Tensor)>, config: &OptimConfig) -> Result<Optimizer> {
    ensure!(!parameters.is_empty(), "nothing to train: no adapter, no patch embedding, no head");
    for part in config.learning_rates.0.keys() {
        ensure!(
            parameters.iter().any(|(name, _)| has_part(name, part)),
            "learning_rates.{part} is part of no trained parameter's name; one such name is `{}`",
            parameters[0].0
        );
    }
    let OptimConfig { beta1, beta2, eps, max_grad_norm, .. } = *config;
    Optimizer::new(groups(parameters, config), OptimizerConfig { beta1, beta2, eps, max_grad_norm })
}

/// Each parameter with the rate and the decay that its name asks for.
fn groups(parameters: Vec<(String, Tensor)>, config: &OptimConfig) -> Vec<Parameter> {
    let parameter = |(name, tensor): (String, Tensor)| Parameter {
        learning_rate: config.learning_rates.of(&name, config.learning_rate),
        weight_decay: if decays(&name, &tensor) { config.weight_decay } else { 0.0 },
        name,
        tensor,
    };
    parameters.into_iter().map(parameter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn config() -> OptimConfig {
        OptimConfig {
            learning_rate: 1e-2,
            learning_rates: LearningRates::default(),
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
        }
    }

    fn rates(rates: &[(&str, f64)]) -> LearningRates {
        LearningRates(rates.iter().map(|&(part, rate)| (part.to_owned(), rate)).collect())
    }

    fn parameter(shape: &[i64], value: f64) -> Tensor {
        Tensor::full(shape, value, (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    #[test]
    fn a_name_chooses_rate_and_decay() {
        let learning_rates = rates(&[("vision_embedding", 3e-3)]);
        let shapes = [("lora_B.weight", &[4, 3][..]), ("vision_embedding.bias", &[6]), ("vision_embedding.w", &[2, 5])];
        let parameters = shapes.map(|(name, shape)| (name.to_owned(), parameter(shape, 1.0))).into();
        let found = groups(parameters, &OptimConfig { learning_rates, ..config() });
        let of: Vec<_> = found.iter().map(|p| (p.name.as_str(), p.learning_rate, p.weight_decay)).collect();
        let expected =
            [("lora_B.weight", 1e-2, 0.1), ("vision_embedding.bias", 3e-3, 0.0), ("vision_embedding.w", 3e-3, 0.1)];
        assert_eq!(of, expected);
    }

    #[test]
    fn names_choose_groups() {
        let rates = rates(&[("lora_A", 1.0), ("vision_embedding", 3.0), ("vision_embedding.patchifier.proj", 4.0)]);
        let of = |name| rates.of(name, 9.0);
        assert_eq!(of("llm.model.layers.0.self_attn.q_proj.lora_A.weight"), 1.0);
        assert_eq!(of("llm.model.layers.0.self_attn.q_proj.lora_B.weight"), 9.0);
        assert_eq!(of("vision_embedding.pos_embed"), 3.0);
        assert_eq!(of("vision_embedding.patchifier.proj.bias"), 4.0);
        assert_eq!(of("vision_embedding2.pos_embed"), 9.0);
        let one = vec![("w".to_owned(), parameter(&[2], 1.0))];
        let error = optimizer(one, &OptimConfig { learning_rates: rates, ..config() }).unwrap_err().to_string();
        assert!(error.contains("learning_rates.lora_A is part of no trained parameter's name"), "{error}");
        for (name, shape, expected) in [
            ("model.layers.0.self_attn.q_norm.weight", [4, 8], false),
            ("vision_embedding.pos_embed", [4, 8], false),
            ("model.layers.0.self_attn.q_proj.weight", [4, 8], true),
        ] {
            assert_eq!(decays(name, &parameter(&shape, 1.0)), expected, "{name}");
        }
        assert!(decays("a.weight", &parameter(&[2, 2], 1.0)) && !decays("a.bias", &parameter(&[2], 1.0)));
    }
}
