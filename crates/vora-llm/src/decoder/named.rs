//! Adapters that act where somebody asks for them by a name, beside the model's own.

use std::collections::HashMap;

use anyhow::{Result, bail, ensure};
use vora_lora::AdapterFolder;
use vora_torch::nn::decode::LoraId;

use super::causal_lm::CausalLm;

/// What stands before `layers.0` in PEFT's names of the LLM's modules: where that is a model of its own, a Gemma 4's or a LLaVA's
/// of transformers 5, a LLaVA's of those before, and a VoRA's.
const DECODERS: [&str; 4] = ["model.", "model.language_model.", "language_model.model.", "llm.model."];

impl CausalLm {
    /// Attaches PEFT's adapter in `folder` to act where somebody asks for `id` alone, beside whatever others there are. It is
    /// one for the LLM, or for the part of a model that sees which is the LLM.
    ///
    /// # Errors
    /// What cannot act on some rows of a batch ([`AdapterFolder::low_rank_alone`]); an adapter of another model. None of it is
    /// attached then.
    pub fn add_named(&mut self, id: LoraId, folder: &AdapterFolder) -> Result<()> {
        folder.low_rank_alone()?;
        let in_folder =
            |prefix: &&str| folder.modules().iter().any(|path| path.starts_with(&format!("{prefix}layers.")));
        let prefix = DECODERS.into_iter().find(in_folder).unwrap_or(DECODERS[0]);
        let own_path = |path: &str| format!("{prefix}{}", path.strip_prefix(DECODERS[0]).unwrap_or(path));
        let (device, name) = (self.device(), format!("{id:?}"));
        let attached =
            folder.attach(&name, device, |visit| self.linears_mut(&mut |path, linear| visit(&own_path(path), linear)));
        self.linears_mut(&mut |_, linear| {
            if linear.adapters().any(|adapter| adapter.name() == name) {
                let adapter = linear.detach(&name)?;
                if attached.is_ok() {
                    linear.add_named(id, adapter);
                }
            }
            Ok(())
        })?;
        attached.map(drop)
    }

    /// Takes the adapters of `other`, to act where somebody asks for `id` alone.
    ///
    /// # Errors
    /// Where there is more than `B A` at a linear: DoRA, and biases that came with the adapters. None is taken then.
    pub fn take_named(&mut self, id: LoraId, other: &mut Self) -> Result<()> {
        other.linears(&mut |path, linear| {
            let is_dora = linear.adapters().any(|adapter| adapter.magnitude().is_some());
            ensure!(!is_dora, "{path} has a DoRA's magnitudes, which scale the rows of the weight itself");
            ensure!(!linear.bias_is_adapted(), "{path} has a bias that came with its adapter");
            Ok(())
        })?;
        let mut taken = HashMap::new();
        other.linears_mut(&mut |path, linear| {
            let names: Vec<String> = linear.adapters().map(|adapter| adapter.name().to_owned()).collect();
            let adapters = names.iter().map(|name| linear.detach(name)).collect::<Result<Vec<_>>>()?;
            taken.insert(path.to_owned(), adapters);
            Ok(())
        })?;
        self.linears_mut(&mut |path, linear| {
            for adapter in taken.remove(path).into_iter().flatten() {
                linear.add_named(id, adapter);
            }
            Ok(())
        })?;
        if let Some(path) = taken.keys().next() {
            bail!("its {path} is nowhere here");
        }
        Ok(())
    }
}
