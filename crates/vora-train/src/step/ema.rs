//! An exponential moving average of the trained weights, which a run may evaluate and leave behind in their place.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_torch::checkpoint::Checkpoint;

/// `average <- decay * average + (1 - decay) * weight` after every step, in f32; the first step's weights start it
/// (torch's `AveragedModel` with `get_ema_multi_avg_fn`).
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    num_averaged: u64,
    averages: Vec<(String, Tensor)>,
}

impl Ema {
    /// An average of nothing yet.
    pub fn new(parameters: &[(String, Tensor)], decay: f64) -> Self {
        let averages = parameters.iter().map(|(name, tensor)| (name.clone(), tensor.detach().copy())).collect();
        Self { decay, num_averaged: 0, averages }
    }

    /// Takes the weights after a step in. `parameters` are those it was made of.
    pub fn update(&mut self, parameters: &[(String, Tensor)]) {
        tch::no_grad(|| {
            for ((_, average), (_, parameter)) in self.averages.iter_mut().zip(parameters) {
                if self.num_averaged == 0 {
                    average.copy_(parameter);
                } else {
                    let _ = average.lerp_(parameter, 1.0 - self.decay);
                }
            }
        });
        self.num_averaged += 1;
    }

    /// Puts the averages in the parameters' place until what is returned is dropped. Nothing changes before the first
    /// update.
    pub fn in_place(&self, parameters: &[(String, Tensor)]) -> InPlace {
        let averages = if self.num_averaged > 0 { &self.averages[..] } else { &[] };
        let pair = |((_, a), (_, b)): (&(String, Tensor), &(String, Tensor))| (a.shallow_clone(), b.shallow_clone());
        let in_place = InPlace(averages.iter().zip(parameters).map(pair).collect());
        in_place.swap();
        in_place
    }

    /// The averages by parameter name, and how many weights are in them.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let averages = self.averages.iter().map(|(name, average)| (name.clone(), average.shallow_clone()));
        averages.chain([("num_averaged".to_owned(), Tensor::from(self.num_averaged as i64))]).collect()
    }

    /// Takes back what [`Self::state`] gave.
    ///
    /// # Errors
    /// Where a tensor is missing or has another shape.
    pub fn load_state(&mut self, saved: &Checkpoint) -> Result<()> {
        for (name, average) in &mut self.averages {
            let saved = saved.tensor(name)?;
            ensure!(
                saved.size() == average.size(),
                "`{name}` is {:?}, this run expects {:?}",
                saved.size(),
                average.size()
            );
            tch::no_grad(|| average.copy_(&saved));
        }
        self.num_averaged = u64::try_from(saved.tensor("num_averaged")?.int64_value(&[]))?;
        Ok(())
    }
}

/// While it lives, averages and weights stand in each other's place.
#[derive(Debug)]
pub struct InPlace(Vec<(Tensor, Tensor)>);

impl InPlace {
    fn swap(&self) {
        tch::no_grad(|| {
            for (average, parameter) in &self.0 {
                let weights = parameter.copy();
                parameter.shallow_clone().copy_(average);
                average.shallow_clone().copy_(&weights);
            }
        });
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        self.swap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// The weights after some step of the golden run.
    fn weights(golden: &fixtures::Golden, step: usize) -> Vec<(String, Tensor)> {
        golden.under(&format!("ema.weights.{step}.")).into_iter().collect()
    }

    #[test]
    fn matches_torch_and_goes_on_bit_for_bit() {
        let golden = fixtures::open("training");
        let mut ema = Ema::new(&weights(&golden, 0), 0.9);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ema.safetensors");
        for step in 0..6 {
            ema.update(&weights(&golden, step));
            for (name, average) in &ema.averages {
                fixtures::assert_close_to(average, &golden[&*format!("ema.average.{step}.{name}")], 1e-6);
            }
            if step == 2 {
                vora_torch::checkpoint::save(&path, &ema.state(), &[]).unwrap();
            }
        }
        let mut resumed = Ema::new(&weights(&golden, 0), 0.9);
        resumed.load_state(&Checkpoint::open(&path).unwrap()).unwrap();
        for step in 3..6 {
            resumed.update(&weights(&golden, step));
        }
        for ((name, a), (_, b)) in ema.state().iter().zip(&resumed.state()) {
            assert!(a.equal(b), "{name}");
        }
    }

    #[test]
    fn weights_come_back_as_they_were() {
        let parameter = |value: f64| vec![("w".to_owned(), Tensor::full([2], value, (Kind::Float, Device::Cpu)))];
        let parameters = parameter(1.0);
        let mut ema = Ema::new(&parameters, 0.5);
        drop(ema.in_place(&parameters));
        ema.update(&parameters);
        tch::no_grad(|| parameters[0].1.shallow_clone().copy_(&parameter(2.0)[0].1));
        ema.update(&parameters);
        {
            let _averaged = ema.in_place(&parameters);
            assert!(parameters[0].1.equal(&parameter(1.5)[0].1));
        }
        assert!(parameters[0].1.equal(&parameter(2.0)[0].1));
        assert!(ema.averages[0].1.equal(&parameter(1.5)[0].1));
    }
}
