//! A decoder's blocks by what processes send each other of them.

use anyhow::Result;
use serde::Serialize;
use vora_llm::CausalLm;
use vora_lora::{Linear, in_layer};

/// Blocks of the LLM in a row that are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Blocks {
    /// How many.
    pub count: u64,
    /// Bytes of the frozen weights of one's linear layers, in the dtype that they are computed with: what `zero_stage: 3`
    /// shares out. Weights in few bits are not shared.
    pub frozen: u64,
    /// Bytes of the gradient of one's adapters.
    pub adapters: u64,
}

impl Blocks {
    /// Those of an LLM, first to last.
    pub(super) fn of(llm: &CausalLm) -> Result<Vec<Self>> {
        let element = llm.kind().elt_size_in_bytes() as u64;
        let mut sizes = vec![(0, 0); llm.config().num_hidden_layers];
        llm.linears(&mut |path, linear| {
            let layer = in_layer(path).0.and_then(|layer| usize::try_from(layer).ok());
            if let Some((frozen, adapters)) = layer.and_then(|layer| sizes.get_mut(layer)) {
                *frozen += element * frozen_elements(linear);
                *adapters += 4 * linear.num_adapter_parameters() as u64;
            }
            Ok(())
        })?;
        let alike = sizes.chunk_by(|a, b| a == b);
        Ok(alike.map(|alike| Self { count: alike.len() as u64, frozen: alike[0].0, adapters: alike[0].1 }).collect())
    }
}

/// Elements of a weight that is frozen and whole, or in shares.
pub(super) fn frozen_elements(linear: &Linear) -> u64 {
    let is_frozen = linear.sharded().is_some() || linear.plain().is_some_and(|weight| !weight.requires_grad());
    if is_frozen { linear.in_features() as u64 * linear.out_features() as u64 } else { 0 }
}
