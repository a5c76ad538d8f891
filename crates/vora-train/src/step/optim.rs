//! AdamW over f32 masters, in groups that have learning rates of their own.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use vora_torch::ops::{self, AdamW};
use vora_torch::safetensors::Checkpoint;

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

/// Parameters that share a rate and a decay.
#[derive(Debug)]
struct Group {
    learning_rate: f64,
    weight_decay: f64,
    members: Vec<usize>,
}

/// AdamW (Loshchilov & Hutter 2019) with its running means, one fused call per group.
///
/// Every parameter takes part in every step: one that a batch did not reach has a gradient of zero, so that a step
/// does not depend on what was reached before it.
#[derive(Debug)]
pub struct Optimizer {
    parameters: Vec<(String, Tensor)>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    step: Tensor, // [], f32: fused AdamW reads it where the parameters are
    groups: Vec<Group>,
    config: OptimConfig,
}

impl Optimizer {
    /// Starts with running means of zero. The parameters are f32 leaves, by their names on disk.
    pub fn new(parameters: Vec<(String, Tensor)>, config: OptimConfig) -> Result<Self> {
        ensure!(!parameters.is_empty(), "nothing to train: no adapter, no patch embedding, no head");
        for part in config.learning_rates.0.keys() {
            ensure!(
                parameters.iter().any(|(name, _)| has_part(name, part)),
                "learning_rates.{part} is part of no trained parameter's name; one such name is `{}`",
                parameters[0].0
            );
        }
        let mut groups: Vec<Group> = Vec::new();
        for (i, (name, tensor)) in parameters.iter().enumerate() {
            ensure!(tensor.kind() == Kind::Float, "parameter `{name}` is {:?}, a master is f32", tensor.kind());
            let learning_rate = config.learning_rates.of(name, config.learning_rate);
            let weight_decay = if decays(name, tensor) { config.weight_decay } else { 0.0 };
            match groups.iter_mut().find(|g| g.learning_rate == learning_rate && g.weight_decay == weight_decay) {
                Some(group) => group.members.push(i),
                None => groups.push(Group { learning_rate, weight_decay, members: vec![i] }),
            }
        }
        let zeros = || parameters.iter().map(|(_, t)| t.zeros_like().set_requires_grad(false)).collect();
        let step = Tensor::zeros([], (Kind::Float, parameters[0].1.device()));
        Ok(Self { exp_avgs: zeros(), exp_avg_sqs: zeros(), step, groups, config, parameters })
    }

    /// The trained tensors by name.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Forgets all gradients.
    pub fn zero_grad(&mut self) -> Result<()> {
        ops::scale(&self.defined_gradients(), 0.0)
    }

    /// Multiplies the gradient by `factor`: what a [`LossScale`](crate::step::loss_scale::LossScale) multiplied it by, inverted.
    pub fn scale_gradient(&mut self, factor: f64) -> Result<()> {
        ops::scale(&self.defined_gradients(), factor)
    }

    /// The global 2-norm of the gradient, as a 0-dim f32 tensor where the parameters are: reading it is up to the
    /// caller, who reads the losses with it.
    pub fn grad_norm(&self) -> Result<Tensor> {
        ops::grad_norm(&self.gradients())
    }

    /// One step with every learning rate times `factor`, the gradient clipped by its norm as [`Self::grad_norm`]
    /// found it. The norm must be finite: then every gradient is.
    pub fn step(&mut self, factor: f64, grad_norm: f64) -> Result<()> {
        ensure!(grad_norm.is_finite(), "the gradient's norm is {grad_norm}");
        let gradients = self.gradients();
        let OptimConfig { max_grad_norm, beta1, beta2, eps, .. } = self.config;
        // As torch's clip_grad_norm_.
        let clip = max_grad_norm / (grad_norm + 1e-6);
        if max_grad_norm > 0.0 && clip < 1.0 {
            ops::scale(&gradients, clip)?;
        }
        self.step += 1;
        for Group { learning_rate, weight_decay, members } in &self.groups {
            let pick = |of: &dyn Fn(usize) -> Tensor| members.iter().map(|&i| of(i)).collect::<Vec<_>>();
            let adamw = AdamW { lr: learning_rate * factor, beta1, beta2, weight_decay: *weight_decay, eps };
            ops::fused_adamw(
                &pick(&|i| self.parameters[i].1.shallow_clone()),
                &pick(&|i| gradients[i].shallow_clone()),
                &pick(&|i| self.exp_avgs[i].shallow_clone()),
                &pick(&|i| self.exp_avg_sqs[i].shallow_clone()),
                &pick(&|_| self.step.shallow_clone()),
                adamw,
            )?;
        }
        Ok(())
    }

    /// Those that a backward pass has made.
    fn defined_gradients(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, tensor)| tensor.grad()).filter(Tensor::defined).collect()
    }

    /// One for each parameter.
    fn gradients(&self) -> Vec<Tensor> {
        let gradient = |t: &Tensor| {
            let gradient = t.grad();
            if gradient.defined() { gradient } else { t.zeros_like().set_requires_grad(false) }
        };
        self.parameters.iter().map(|(_, t)| gradient(t)).collect()
    }

    /// Running means and step, by parameter name.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_owned(), self.step.shallow_clone())];
        for (i, (name, _)) in self.parameters.iter().enumerate() {
            state.push((format!("{name}.exp_avg"), self.exp_avgs[i].shallow_clone()));
            state.push((format!("{name}.exp_avg_sq"), self.exp_avg_sqs[i].shallow_clone()));
        }
        state
    }

    /// Takes back what [`Self::state`] gave.
    pub fn load_state(&mut self, saved: &Checkpoint) -> Result<()> {
        let expected = self.state();
        let saved_len = saved.names().count();
        ensure!(
            saved_len == expected.len(),
            "{} has {saved_len} tensors, this run's optimizer {}",
            saved.path().display(),
            expected.len()
        );
        for (name, tensor) in expected {
            let saved = saved.tensor(&name)?;
            ensure!(
                saved.size() == tensor.size(),
                "`{name}` is {:?}, this run expects {:?}",
                saved.size(),
                tensor.size()
            );
            tch::no_grad(|| tensor.shallow_clone().copy_(&saved));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

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

    #[test]
    fn gradients_stay_in_their_buffers() {
        let x = parameter(&[3, 2], 1.0);
        let mut optimizer = Optimizer::new(vec![("x".to_owned(), x.shallow_clone())], config()).unwrap();
        let mut buffers = Vec::new();
        for _ in 0..3 {
            optimizer.zero_grad().unwrap();
            x.square().sum(Kind::Float).backward();
            let norm = optimizer.grad_norm().unwrap().double_value(&[]);
            optimizer.step(1.0, norm).unwrap();
            buffers.push(x.grad().data_ptr());
        }
        assert!(!buffers[0].is_null() && buffers.iter().all(|buffer| *buffer == buffers[0]));
    }

    fn rates(rates: &[(&str, f64)]) -> LearningRates {
        LearningRates(rates.iter().map(|&(part, rate)| (part.to_owned(), rate)).collect())
    }

    fn parameter(shape: &[i64], value: f64) -> Tensor {
        Tensor::full(shape, value, (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    /// Steps over the golden gradients, from `from` on.
    fn run(optimizer: &mut Optimizer, golden: &fixtures::Golden, steps: std::ops::Range<usize>) {
        for step in steps {
            optimizer.zero_grad().unwrap();
            let loss = optimizer
                .parameters()
                .iter()
                .map(|(name, t)| (t * &golden[&*format!("adamw.grad.{step}.{name}")]).sum(Kind::Float))
                .reduce(|a, b| a + b)
                .unwrap();
            loss.backward();
            let norm = optimizer.grad_norm().unwrap().double_value(&[]);
            let expected = golden[&*format!("adamw.norm.{step}")].double_value(&[]);
            assert!((norm - expected).abs() < 1e-4, "norm {norm}, expected {expected}");
            optimizer.step(golden["adamw.factors"].double_value(&[step as i64]), norm).unwrap();
        }
    }

    fn golden_optimizer(golden: &fixtures::Golden) -> Optimizer {
        let parameters = golden
            .under("adamw.start.")
            .into_iter()
            .map(|(name, t)| (name, t.copy().set_requires_grad(true)))
            .collect();
        Optimizer::new(parameters, OptimConfig { learning_rates: rates(&[("vision_embedding", 3e-3)]), ..config() })
            .unwrap()
    }

    #[test]
    fn matches_torch_with_groups_and_clipping() {
        let golden = fixtures::open("losses");
        let mut optimizer = golden_optimizer(&golden);
        run(&mut optimizer, &golden, 0..6);
        for (name, tensor) in optimizer.parameters() {
            fixtures::assert_close_to(tensor, &golden[&*format!("adamw.end.{name}")], 1e-6);
        }
    }

    #[test]
    fn a_saved_state_goes_on_bit_for_bit() {
        let golden = fixtures::open("losses");
        let mut whole = golden_optimizer(&golden);
        run(&mut whole, &golden, 0..3);
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("optimizer.safetensors");
        vora_torch::safetensors::save(&state, &whole.state(), &[]).unwrap();
        let weights: Vec<Tensor> = whole.parameters().iter().map(|(_, t)| t.detach().copy()).collect();
        run(&mut whole, &golden, 3..6);

        let mut resumed = golden_optimizer(&golden);
        for ((_, parameter), saved) in resumed.parameters().iter().zip(&weights) {
            tch::no_grad(|| parameter.shallow_clone().copy_(saved));
        }
        resumed.load_state(&Checkpoint::open(&state).unwrap()).unwrap();
        run(&mut resumed, &golden, 3..6);
        for ((_, a), (_, b)) in whole.parameters().iter().zip(resumed.parameters()) {
            assert!(a.equal(b));
        }
        for ((_, a), (_, b)) in whole.state().iter().zip(&resumed.state()) {
            assert!(a.equal(b));
        }
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
        let error = Optimizer::new(one, OptimConfig { learning_rates: rates, ..config() }).unwrap_err().to_string();
        assert!(error.contains("learning_rates.lora_A is part of no trained parameter's name"), "{error}");
        let optimizer = Optimizer::new(
            vec![("a.weight".into(), parameter(&[2, 2], 1.0)), ("a.bias".into(), parameter(&[2], 1.0))],
            config(),
        )
        .unwrap();
        for (name, shape, expected) in [
            ("model.layers.0.self_attn.q_norm.weight", [4, 8], false),
            ("vision_embedding.pos_embed", [4, 8], false),
            ("model.layers.0.self_attn.q_proj.weight", [4, 8], true),
        ] {
            assert_eq!(decays(name, &parameter(&shape, 1.0)), expected, "{name}");
        }
        let decays: Vec<f64> = optimizer.groups.iter().map(|g| g.weight_decay).collect();
        assert_eq!(decays, [0.1, 0.0]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_touches_nothing() {
        let mut optimizer = Optimizer::new(vec![("w".into(), parameter(&[2], 1.0))], config()).unwrap();
        (&optimizer.parameters()[0].1 * f64::NAN).sum(Kind::Float).backward();
        let norm = optimizer.grad_norm().unwrap().double_value(&[]);
        let error = optimizer.step(1.0, norm).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
        assert!(optimizer.parameters()[0].1.equal(&parameter(&[2], 1.0)));
        assert_eq!(optimizer.state()[0].1.double_value(&[]), 0.0);
    }

    #[test]
    fn another_runs_state_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let optimizer = Optimizer::new(vec![("w".into(), parameter(&[2], 1.0))], config()).unwrap();
        vora_torch::safetensors::save(&path, &optimizer.state(), &[]).unwrap();
        let saved = Checkpoint::open(&path).unwrap();
        let mut other = Optimizer::new(vec![("w".into(), parameter(&[3], 1.0))], config()).unwrap();
        let error = other.load_state(&saved).unwrap_err().to_string();
        assert!(error.contains("`w.exp_avg` is [2], this run expects [3]"), "{error}");
    }
}
