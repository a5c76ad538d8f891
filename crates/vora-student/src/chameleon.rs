//! A Chameleon to train: an LLM whose vocabulary gets the codes of an image tokenizer, and all of whose weights learn.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_model::{Chameleon, VQMODEL};
use vora_recipe::VqTraining;
use vora_torch::checkpoint::Checkpoint;
use vora_torch::weights::Weights;

use crate::opening::Opening;
use crate::{Student, StudentParts};

/// Opens the LLM, widens its vocabulary, and puts a new image tokenizer before it.
pub(crate) fn student(opening: Opening<'_>, vqmodel: &VqTraining) -> Result<Student> {
    let Opening { config, llm_folder, pictures, device, kind, .. } = opening;
    let section = &config.model;
    let vq = vqmodel.config(section.image_size);
    let llm_config = LlmConfig::open(&llm_folder)?;
    let chameleon = Chameleon::config_over(&llm_config, &vq).context("model.llm")?;

    let new = Weights::random(config.seed, device, kind);
    let llm = Weights::from_tensors(widened(&Checkpoint::open(&llm_folder)?, &chameleon, &new)?, device, kind);
    let model = Chameleon::assemble(&chameleon, &llm.trained(), &new.pp(VQMODEL))?;
    llm.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;
    let made = model.vqmodel().tensors().into_iter().map(|(name, tensor)| (format!("{VQMODEL}.{name}"), tensor));
    let made = made.collect();
    let trained = Weights::random(config.seed, device, kind); // nothing but the LLM is
    let parts = StudentParts { model: Box::new(model), trained, llm: Some(llm), llm_folder, pictures };
    Ok(Student { made, ..Student::from_parts(parts, config)? })
}

/// The LLM's tensors with rows for the new tokens in embedding and head: normal, with the mean and the spread of those
/// that are there.
fn widened(llm: &Checkpoint, config: &LlmConfig, new: &Weights) -> Result<Vec<(String, Tensor)>> {
    let widen = |name: &str, old: Tensor| {
        let (rows, columns) = old.size2()?;
        let added = config.vocab_size - rows;
        ensure!(added > 0, "`{name}` has {rows} rows, the vocabulary with image tokens {}", config.vocab_size);
        let normal = vora_torch::weights::Init::Normal { std: 1.0 };
        let noise = new.pp(name).get("image_tokens", &[added, columns], normal)?.to_kind(Kind::Float);
        let mean = old.mean_dim([0i64].as_slice(), true, Kind::Float); // [1, hidden]
        let spread = old.std_dim([0i64].as_slice(), true, true);
        anyhow::Ok(Tensor::cat(&[old, mean + noise.to_device(Device::Cpu) * spread], 0))
    };
    llm.names()
        .map(|name| {
            let tensor = llm.tensor_as(name, Kind::Float)?;
            let is_vocabulary = ["model.embed_tokens.weight", "lm_head.weight"].contains(&name);
            Ok((name.to_owned(), if is_vocabulary { widen(name, tensor)? } else { tensor }))
        })
        .collect()
}
