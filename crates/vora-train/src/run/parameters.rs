//! Elements of what a run's model is made of: frozen and trained, and the adapters by where they sit.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;
use vora_llm::CausalLm;
use vora_lora::in_layer;
use vora_model::VisionLanguageModel;
use vora_student::Student;
use vora_torch::weights::QuantizedWeight;

use super::blocks::frozen_elements;

/// Elements of tensors.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Parameters {
    /// Of the model, as it was and stays.
    pub frozen: u64,
    /// Those of them that are kept in few bits.
    #[serde(skip_serializing_if = "is_zero")]
    pub quantized: u64,
    /// Of the teacher.
    pub teacher: u64,
    /// Trained ones by part of the model.
    pub trained: BTreeMap<String, u64>,
    /// Of the largest tensor that is trained, which no two processes share.
    pub largest: u64,
}

/// Linear layers of one name and one rank that carry adapters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Adapted {
    /// The part of the model that they are in, as names in its folder begin: `llm`, `language_model`, `vision_tower`.
    pub part: String,
    /// Their name within a layer.
    pub module: String,
    /// The rank.
    pub r: i64,
    /// How many there are.
    pub linears: u64,
    /// Elements of their adapters.
    pub parameters: u64,
}

impl Adapted {
    /// Those of a model, in the order of its layers.
    pub(super) fn of(model: &dyn VisionLanguageModel) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        model.linears(&mut |path, linear| {
            let (part, module) = (path.split('.').next().unwrap_or(path), in_layer(path).1);
            for adapter in linear.adapters() {
                let (r, parameters) = (adapter.r(), adapter.num_parameters() as u64);
                let found = all.iter_mut().find(|known| known.part == part && known.module == module && known.r == r);
                match found {
                    Some(known) => {
                        known.linears += 1;
                        known.parameters += parameters;
                    }
                    None => {
                        let (part, module) = (part.to_owned(), module.to_owned());
                        all.push(Self { part, module, r, linears: 1, parameters });
                    }
                }
            }
            Ok(())
        })?;
        Ok(all)
    }
}

impl Parameters {
    pub(super) fn of(student: &Student) -> Result<Self> {
        let mut trained = BTreeMap::new();
        for (name, tensor) in student.parameters() {
            let part = if name.contains(".lora_") { "adapters" } else { name.split('.').next().unwrap_or(&name) };
            *trained.entry(part.to_owned()).or_default() += tensor.numel() as u64;
        }
        let llm = student.model.llm();
        let quantized = in_few_bits(llm, |weight| weight.size().iter().product::<i64>() as u64).sum::<u64>();
        let plain = llm.plain_tensors();
        let mut frozen: u64 =
            plain.iter().filter(|(_, tensor)| !tensor.requires_grad()).map(|(_, tensor)| tensor.numel() as u64).sum();
        frozen += quantized + in_shares(llm);
        frozen += student.made().iter().map(|(_, tensor)| tensor.numel() as u64).sum::<u64>();
        frozen += student.model.encoder_tensors().iter().map(|(_, tensor)| tensor.numel() as u64).sum::<u64>();
        let teacher = student.distill.as_ref().map_or(0, |distill| distill.teacher().num_parameters());
        let largest = student.parameters().iter().map(|(_, tensor)| tensor.numel() as u64).max().unwrap_or(0);
        Ok(Self { frozen, quantized, teacher, trained, largest })
    }

    pub(super) fn num_trained(&self) -> u64 {
        self.trained.values().sum()
    }
}

/// What `count` gives for each weight of the LLM that is kept in few bits.
pub(super) fn in_few_bits(llm: &CausalLm, count: impl Fn(&QuantizedWeight) -> u64) -> impl Iterator<Item = u64> {
    let mut counts = Vec::new();
    let visited = llm.linears(&mut |_, linear| {
        counts.extend(linear.quantized().map(&count));
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the visit returns no error");
    counts.into_iter()
}

/// Elements of the LLM's weights that several processes share.
fn in_shares(llm: &CausalLm) -> u64 {
    let mut elements = 0;
    let visited = llm.linears(&mut |_, linear| {
        elements += linear.sharded().map_or(0, |_| frozen_elements(linear));
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the visit returns no error");
    elements
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}
