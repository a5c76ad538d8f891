//! AdamW over f32 masters.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::checkpoint::Checkpoint;
use crate::optim::adamw::{AdamW, fused_adamw};
use crate::optim::gradients::{grad_norm, scale};

/// A trained tensor, and how it learns.
#[derive(Debug)]
pub struct Parameter {
    /// Its name on disk.
    pub name: String,
    /// An f32 leaf.
    pub tensor: Tensor,
    /// Learning rate at a schedule factor of 1.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// What all parameters share.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerConfig {
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// The gradient is scaled down to this global 2-norm; 0 leaves it as it is.
    pub max_grad_norm: f64,
}

/// Those of HF's `TrainingArguments`.
impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0 }
    }
}

/// Parameters that share a rate and a decay.
#[derive(Debug)]
struct Group {
    learning_rate: f64,
    weight_decay: f64,
    members: Vec<usize>, // numbers among this process's own
}

/// AdamW (Loshchilov & Hutter 2019) with its running means, one fused call per group.
///
/// Every parameter takes part in every step: one that a batch did not reach has a gradient of zero, so that a step
/// does not depend on what was reached before it.
///
/// Several processes that train the same parameters may each keep a share of the running means, and change that share
/// of the parameters: [`Self::sharded`].
#[derive(Debug)]
pub struct Optimizer {
    parameters: Vec<(String, Tensor)>,
    own: Vec<usize>,               // those that this process changes
    pub(super) owners: Vec<usize>, // which rank changes each
    exp_avgs: Vec<Tensor>,         // of its own
    exp_avg_sqs: Vec<Tensor>,      // of its own
    step: Tensor,                  // [], f32: fused AdamW reads it where the parameters are
    groups: Vec<Group>,
    config: OptimizerConfig,
}

impl Optimizer {
    /// Of parameters that all learn at one rate, without weight decay: those of [`Weights`](crate::weights::Weights).
    ///
    /// # Errors
    /// See [`Optimizer::new`].
    pub fn adamw(parameters: Vec<(String, Tensor)>, learning_rate: f64, config: OptimizerConfig) -> Result<Self> {
        let parameter = |(name, tensor)| Parameter { name, tensor, learning_rate, weight_decay: 0.0 };
        Self::new(parameters.into_iter().map(parameter).collect(), config)
    }

    /// Starts with running means of zero. The parameters are f32 leaves; those of one rate and one decay make a group.
    ///
    /// # Errors
    /// Where there are none, or one is not f32.
    pub fn new(parameters: Vec<Parameter>, config: OptimizerConfig) -> Result<Self> {
        Self::sharded(parameters, config, 0, 1)
    }

    /// That of `rank` among `world_size` processes, ZeRO's first stage (Rajbhandari et al. 2020): whole tensors are dealt to
    /// them, about as many elements to each, and [`Self::step`] changes those of this process. The others' come by
    /// [`Self::gather_parameters`].
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn sharded(
        parameters: Vec<Parameter>,
        config: OptimizerConfig,
        rank: usize,
        world_size: usize,
    ) -> Result<Self> {
        ensure!(!parameters.is_empty(), "an optimizer of no parameters");
        let owners = deal(&parameters.iter().map(|p| p.tensor.numel()).collect::<Vec<_>>(), world_size);
        let own: Vec<usize> = (0..parameters.len()).filter(|&i| owners[i] == rank).collect();
        for Parameter { name, tensor, .. } in &parameters {
            ensure!(tensor.kind() == Kind::Float, "parameter `{name}` is {:?}, a master is f32", tensor.kind());
        }
        let mut groups: Vec<Group> = Vec::new();
        for (i, &parameter) in own.iter().enumerate() {
            let Parameter { learning_rate, weight_decay, .. } = &parameters[parameter];
            match groups.iter_mut().find(|g| g.learning_rate == *learning_rate && g.weight_decay == *weight_decay) {
                Some(group) => group.members.push(i),
                None => {
                    groups.push(Group { learning_rate: *learning_rate, weight_decay: *weight_decay, members: vec![i] })
                }
            }
        }
        let parameters: Vec<(String, Tensor)> = parameters.into_iter().map(|p| (p.name, p.tensor)).collect();
        let zeros = || own.iter().map(|&i| parameters[i].1.zeros_like().set_requires_grad(false)).collect();
        let step = Tensor::zeros([], (Kind::Float, parameters[0].1.device()));
        Ok(Self { exp_avgs: zeros(), exp_avg_sqs: zeros(), step, groups, config, own, owners, parameters })
    }

    /// The trained tensors by name.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// Forgets all gradients.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn zero_grad(&mut self) -> Result<()> {
        scale(&self.defined_gradients(), 0.0)
    }

    /// Multiplies the gradient by `factor`: the inverse of what a loss was multiplied by.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn scale_gradient(&mut self, factor: f64) -> Result<()> {
        scale(&self.defined_gradients(), factor)
    }

    /// The global 2-norm of the gradient, as a 0-dim f32 tensor where the parameters are: reading it is up to the
    /// caller, who reads the losses with it.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn grad_norm(&self) -> Result<Tensor> {
        grad_norm(&self.gradients())
    }

    /// One step with every learning rate times `factor`, the gradient clipped by its norm as [`Self::grad_norm`]
    /// found it. The norm must be finite: then every gradient is.
    ///
    /// # Errors
    /// Where the norm is not finite: nothing has been touched then.
    pub fn step(&mut self, factor: f64, grad_norm: f64) -> Result<()> {
        ensure!(grad_norm.is_finite(), "the gradient's norm is {grad_norm}");
        let gradients = self.gradients();
        let OptimizerConfig { max_grad_norm, beta1, beta2, eps } = self.config;
        // As torch's clip_grad_norm_.
        let clip = max_grad_norm / (grad_norm + 1e-6);
        if max_grad_norm > 0.0 && clip < 1.0 {
            scale(&gradients, clip)?;
        }
        self.step += 1;
        for Group { learning_rate, weight_decay, members } in &self.groups {
            let pick = |of: &dyn Fn(usize) -> Tensor| members.iter().map(|&i| of(i)).collect::<Vec<_>>();
            let adamw = AdamW { lr: learning_rate * factor, beta1, beta2, weight_decay: *weight_decay, eps };
            fused_adamw(
                &pick(&|i| self.parameters[self.own[i]].1.shallow_clone()),
                &pick(&|i| gradients[self.own[i]].shallow_clone()),
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

    /// The step, then running means by parameter name; of a sharded one this process's.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_owned(), self.step.shallow_clone())];
        for (i, name) in self.own.iter().map(|&i| &self.parameters[i].0).enumerate() {
            state.push((format!("{name}.exp_avg"), self.exp_avgs[i].shallow_clone()));
            state.push((format!("{name}.exp_avg_sq"), self.exp_avg_sqs[i].shallow_clone()));
        }
        state
    }

    /// Takes back what [`Self::state`] gave; a sharded one its share of what all processes gave, whatever their number was.
    ///
    /// # Errors
    /// Where the checkpoint holds another optimizer's state, or cannot be read.
    pub fn load_state(&mut self, saved: &Checkpoint) -> Result<()> {
        let expected_len = 1 + 2 * self.parameters.len();
        let saved_len = saved.names().count();
        ensure!(
            saved_len == expected_len,
            "{} has {saved_len} tensors, this run's optimizer {expected_len}",
            saved.path().display()
        );
        for (name, tensor) in self.state() {
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

/// Which of `world_size` ranks each of these goes to: the largest first, each to the rank that has least.
fn deal(sizes: &[usize], world_size: usize) -> Vec<usize> {
    let mut by_size: Vec<usize> = (0..sizes.len()).collect();
    by_size.sort_by_key(|&i| std::cmp::Reverse(sizes[i])); // stable: the same in every process
    let mut loads = vec![0; world_size.max(1)];
    let mut owners = vec![0; sizes.len()];
    for i in by_size {
        let least = (0..loads.len()).min_by_key(|&rank| loads[rank]).unwrap_or(0);
        loads[least] += sizes[i];
        owners[i] = least;
    }
    owners
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::checkpoint::save;

    fn config() -> OptimizerConfig {
        OptimizerConfig { beta1: 0.9, beta2: 0.98, eps: 1e-8, max_grad_norm: 1.0 }
    }

    fn parameter(shape: &[i64], value: f64) -> Tensor {
        Tensor::full(shape, value, (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    fn of(name: &str, tensor: Tensor) -> Parameter {
        Parameter { name: name.to_owned(), tensor, learning_rate: 1e-2, weight_decay: 0.1 }
    }

    /// Takes `steps` with the golden gradients.
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

    /// Three groups: the vision embedding learns at another rate, and its bias does not decay.
    fn golden_optimizer(golden: &fixtures::Golden) -> Optimizer {
        let parameter = |(name, t): (String, Tensor)| {
            let learning_rate = if name.starts_with("vision_embedding") { 3e-3 } else { 1e-2 };
            let weight_decay = if t.dim() >= 2 { 0.1 } else { 0.0 };
            Parameter { learning_rate, weight_decay, ..of(&name, t.copy().set_requires_grad(true)) }
        };
        Optimizer::new(golden.under("adamw.start.").into_iter().map(parameter).collect(), config()).unwrap()
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
    fn gradients_stay_in_their_buffers() {
        let x = parameter(&[3, 2], 1.0);
        let mut optimizer = Optimizer::new(vec![of("x", x.shallow_clone())], config()).unwrap();
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

    #[test]
    fn a_saved_state_goes_on_bit_for_bit() {
        let golden = fixtures::open("losses");
        let mut whole = golden_optimizer(&golden);
        run(&mut whole, &golden, 0..3);
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("optimizer.safetensors");
        save(&state, &whole.state(), &[]).unwrap();
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
    fn a_gradient_that_is_not_finite_touches_nothing() {
        let mut optimizer = Optimizer::new(vec![of("w", parameter(&[2], 1.0))], config()).unwrap();
        (&optimizer.parameters()[0].1 * f64::NAN).sum(Kind::Float).backward();
        let norm = optimizer.grad_norm().unwrap().double_value(&[]);
        let error = optimizer.step(1.0, norm).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
        assert!(optimizer.parameters()[0].1.equal(&parameter(&[2], 1.0)));
        assert_eq!(optimizer.state()[0].1.double_value(&[]), 0.0);
    }

    #[test]
    fn tensors_are_dealt_evenly() {
        assert_eq!(deal(&[5, 9, 1, 4, 3], 1), [0; 5]);
        assert_eq!(deal(&[5, 9, 1, 4, 3], 2), [1, 0, 1, 1, 0]);
        assert_eq!(deal(&[2, 2], 3), [0, 1]);
    }

    #[test]
    fn another_runs_state_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let optimizer = Optimizer::new(vec![of("w", parameter(&[2], 1.0))], config()).unwrap();
        save(&path, &optimizer.state(), &[]).unwrap();
        let saved = Checkpoint::open(&path).unwrap();
        let mut other = Optimizer::new(vec![of("w", parameter(&[3], 1.0))], config()).unwrap();
        let error = other.load_state(&saved).unwrap_err().to_string();
        assert!(error.contains("`w.exp_avg` is [2], this run expects [3]"), "{error}");
    }
}
