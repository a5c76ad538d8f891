//! Where the layers of a VQGAN take their tensors from: a source of weights, and whether they are trained.

use std::cell::RefCell;
use std::fmt::Display;
use std::rc::Rc;

use anyhow::Result;
use tch::Tensor;
use vora_torch::weights::{Init, Weights};

/// A place in a source of weights. Remembers what was taken, so that the model can be saved.
#[derive(Debug, Clone)]
pub(super) struct Params {
    weights: Weights,
    trained: bool,
    path: String, // from the model's root
    taken: Rc<RefCell<Vec<(String, Tensor)>>>,
}

impl Params {
    pub(super) fn new(weights: &Weights, trained: bool) -> Self {
        Self { weights: weights.clone(), trained, path: String::new(), taken: Rc::default() }
    }

    pub(super) fn pp(&self, name: impl Display) -> Self {
        Self { weights: self.weights.pp(&name), path: format!("{}{name}.", self.path), ..self.clone() }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }

    pub(super) fn get(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let tensor = if self.trained {
            self.weights.parameter(name, shape, init)?
        } else {
            self.weights.get(name, shape, init)?
        };
        self.taken.borrow_mut().push((format!("{}{name}", self.path), tensor.shallow_clone()));
        Ok(tensor)
    }

    /// Everything taken so far at any place, by its name from the model's root.
    pub(super) fn taken(&self) -> Vec<(String, Tensor)> {
        self.taken.take()
    }
}
