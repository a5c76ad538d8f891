//! A decoder with the adapters that were put on it: attaching, merging, and the tensors of both, for every model alike.

use anyhow::{Context, Result, ensure};
use tch::Tensor;
use vora_llm::CausalLm;
use vora_lora::{ActsOn, Linear, LoraConfig, attach_all};
use vora_torch::weights::{Quantization, QuantizedWeight, Weights};

/// A decoder, and the configuration of the adapters that are apart from its weights.
#[derive(Debug)]
pub struct AdaptedLlm {
    llm: CausalLm,
    lora: Option<LoraConfig>,
    acts_on: ActsOn,
}

impl AdaptedLlm {
    /// A decoder without adapters.
    pub fn new(llm: CausalLm) -> Self {
        Self { llm, lora: None, acts_on: ActsOn::All }
    }

    /// The decoder.
    pub fn llm(&self) -> &CausalLm {
        &self.llm
    }

    /// The decoder, to change its linears one by one.
    pub fn llm_mut(&mut self) -> &mut CausalLm {
        &mut self.llm
    }

    /// The adapters that are attached; none once they are merged.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// In how few bits the decoder's linear layers keep their weights; none where they are as they were loaded.
    pub fn quantization(&self) -> Option<Quantization> {
        let mut found = None;
        let visited = self.llm.linears(&mut |_, linear| {
            found = found.or(linear.quantized().map(QuantizedWeight::quantization));
            Ok(())
        });
        debug_assert!(visited.is_ok(), "the visit returns no error");
        found
    }

    /// Brings the weights of the decoder's linear layers into few bits, one after another; adapters stay as they are, embedding
    /// and head too. Those that are in these bits already are left alone.
    ///
    /// # Errors
    /// By the layer's name: what is in other bits, is trained, or has numbers that are not finite.
    pub fn quantize(&mut self, quantization: Quantization) -> Result<()> {
        self.llm.linears_mut(&mut |path, linear| {
            linear.quantize(quantization).with_context(|| format!("cannot quantize {path}.weight"))
        })
    }

    /// The tokens that the adapters act on: those that they are trained through, until somebody says otherwise.
    pub fn acts_on(&self) -> ActsOn {
        self.acts_on
    }

    /// Lets the adapters act on these tokens.
    ///
    /// # Errors
    /// Where there are none, and where they were not trained for that; see [`ActsOn::check_opened`].
    pub fn set_acts_on(&mut self, acts_on: ActsOn) -> Result<()> {
        let lora = self.lora.as_ref().context("the adapters are merged into the weights, which act on every token")?;
        lora.acts_on.check_opened(acts_on)?;
        self.acts_on = acts_on;
        Ok(())
    }

    /// Puts a named adapter on the linear layers that `lora` asks for; its tensors stand at their layers' names below
    /// `weights`, the decoder's place in their source.
    ///
    /// # Errors
    /// See [`attach_all`].
    pub fn attach(&mut self, name: &str, lora: &LoraConfig, weights: &Weights) -> Result<()> {
        attach_all(name, lora, weights, |visit| self.llm.linears_mut(visit))?;
        self.lora = Some(lora.clone());
        self.acts_on = lora.acts_on;
        Ok(())
    }

    /// Folds every adapter into its layer's weight: in f32, rounded once. None is left.
    ///
    /// # Errors
    /// Where an adapter holds a number that is not finite, by the name of its layer: merged, it would reach every answer.
    /// Nothing is merged then.
    pub fn merge(&mut self) -> Result<()> {
        self.llm.linears(&mut |path, linear| ensure_finite(path, linear))?;
        self.llm.linears_mut(&mut |_, linear| {
            linear.merge();
            Ok(())
        })?;
        self.lora = None;
        self.acts_on = ActsOn::All;
        Ok(())
    }

    /// Takes every adapter off again: the decoder is what it was before they came.
    ///
    /// # Errors
    /// None of its own: it is that of a visit over the linears.
    pub fn detach(&mut self) -> Result<()> {
        self.llm.linears_mut(&mut |_, linear| detach(linear))?;
        self.lora = None;
        self.acts_on = ActsOn::All;
        Ok(())
    }

    /// The decoder, if no adapter is apart from its weights.
    ///
    /// # Errors
    /// Where one is.
    pub fn merged(&self) -> Result<&CausalLm> {
        self.llm.linears(&mut |_, linear| {
            ensure!(linear.adapters().next().is_none(), "the adapters are still apart from the weights: merge first");
            Ok(())
        })?;
        Ok(&self.llm)
    }

    /// The tensors of all adapters, by the names that they have beside the decoder's own on disk.
    ///
    /// # Errors
    /// None of its own: it is that of a visit over the linears.
    pub fn adapter_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        self.llm.linears(&mut |path, linear| {
            for (name, tensor) in linear.adapters().flat_map(|adapter| adapter.tensors()) {
                tensors.push((format!("{path}.{name}"), tensor.shallow_clone()));
            }
            Ok(())
        })?;
        Ok(tensors)
    }
}

/// Takes every adapter off the linear.
pub(crate) fn detach(linear: &mut Linear) -> Result<()> {
    let names: Vec<String> = linear.adapters().map(|adapter| adapter.name().to_owned()).collect();
    names.iter().try_for_each(|name| linear.detach(name).map(drop))
}

/// An error where an adapter of the linear at `path` or its bias has numbers that are not finite.
pub(crate) fn ensure_finite(path: &str, linear: &Linear) -> Result<()> {
    are_finite(linear).with_context(|| format!("cannot merge: {path}"))
}

fn are_finite(linear: &Linear) -> Result<()> {
    let is_finite = |tensor: &Tensor| bool::try_from(tensor.isfinite().all());
    for adapter in linear.adapters() {
        for (part, tensor) in adapter.tensors() {
            let (part, of) = (part.trim_end_matches(".weight"), adapter.name());
            ensure!(is_finite(tensor)?, "{part} of the adapter `{of}` has numbers that are not finite");
        }
    }
    if let Some(bias) = linear.bias() {
        ensure!(is_finite(bias)?, "the bias has numbers that are not finite");
    }
    Ok(())
}

/// Tensors under a longer name.
pub(crate) fn under(prefix: &str, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
}
