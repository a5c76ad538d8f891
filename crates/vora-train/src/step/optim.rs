//! AdamW over the parameters of a run: each one's rate, and whether it decays, by its name.

use anyhow::{Result, bail, ensure};
use tch::Tensor;
use vora_recipe::OptimConfig;
use vora_torch::optim::{Optimizer, OptimizerConfig, Parameter};

/// Whether weight decay draws this parameter to 0: not biases and norms, as in HF's trainer, and no position table.
/// A norm may be a matrix: Chameleon's of q and k has a row a head.
fn decays(name: &str, tensor: &Tensor) -> bool {
    let is_norm = |step: &str| step == "norm" || step.ends_with("_norm") || step.ends_with("layernorm");
    let is_table = ["pos_embed", "pos_embedding"].iter().any(|table| name.ends_with(table));
    tensor.dim() >= 2 && !is_table && !name.split('.').any(is_norm)
}

/// The optimizer of a run over `parameters`, f32 leaves by their names on disk.
///
/// # Errors
/// Where there are none, a value is out of its range, or a rate of its own fits none of them.
pub fn optimizer(parameters: Vec<(String, Tensor)>, config: &OptimConfig) -> Result<Optimizer> {
    sharded(parameters, config, 0, 1)
}

/// That of `rank` among `world_size` processes, which keeps a share of the running means ([`Optimizer::sharded`]).
///
/// # Errors
/// As [`optimizer`].
pub(crate) fn sharded(
    parameters: Vec<(String, Tensor)>,
    config: &OptimConfig,
    rank: usize,
    world_size: usize,
) -> Result<Optimizer> {
    ensure!(!parameters.is_empty(), "nothing to train: no adapter, no patch embedding, no head");
    config.validate()?;
    if let Some(part) = config.learning_rates.part_of_none(parameters.iter().map(|(name, _)| name.as_str())) {
        bail!("learning_rates.{part} is part of no trained parameter's name; one such name is `{}`", parameters[0].0);
    }
    let OptimConfig { beta1, beta2, eps, max_grad_norm, .. } = *config;
    let shared = OptimizerConfig { beta1, beta2, eps, max_grad_norm };
    Optimizer::sharded(groups(parameters, config), shared, rank, world_size)
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
    use vora_recipe::LearningRates;

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
    fn a_rate_of_no_parameter_is_refused() {
        let rates = rates(&[("lora_A", 1.0), ("vision_embedding", 3.0)]);
        let one = vec![("w".to_owned(), parameter(&[2], 1.0))];
        let error = optimizer(one, &OptimConfig { learning_rates: rates, ..config() }).unwrap_err().to_string();
        assert!(error.contains("learning_rates.lora_A is part of no trained parameter's name"), "{error}");
    }

    #[test]
    fn matrices_decay_but_norms_and_positions() {
        for (name, shape, expected) in [
            ("model.layers.0.self_attn.q_norm.weight", [4, 8], false),
            ("vision_embedding.pos_embed", [4, 8], false),
            ("vision_embedding.vision_embedder.pos_embedding", [4, 8], false),
            ("model.layers.0.self_attn.q_proj.weight", [4, 8], true),
        ] {
            assert_eq!(decays(name, &parameter(&shape, 1.0)), expected, "{name}");
        }
        assert!(decays("a.weight", &parameter(&[2, 2], 1.0)) && !decays("a.bias", &parameter(&[2], 1.0)));
    }
}
