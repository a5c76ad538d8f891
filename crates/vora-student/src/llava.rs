//! A LLaVA to train: a new projection from an encoder into an LLM, each of which is frozen, adapted or trained whole.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_model::{Llava, LlavaConfig, VisionLanguageModel, trained};
use vora_recipe::TrainConfig;
use vora_torch::weights::Weights;
use vora_vision::Encoder;

use vora_model::Resolve;

use crate::few_bits::in_few_bits;
use crate::pictures::Pictures;
use crate::{Student, StudentParts, parts};

/// Opens LLM and encoder and puts a new projection, and adapters where asked for, between and on them.
pub(crate) fn student(
    config: &TrainConfig,
    tower: &str,
    llm_folder: PathBuf,
    pictures: Pictures,
    device: Device,
    kind: Kind,
    resolve: &Resolve<'_>,
) -> Result<Student> {
    let section = &config.model;
    let tower_folder = resolve(tower).context("model.vision_tower")?;
    let before = section.pretrained.as_deref().map(resolve).transpose().context("model.pretrained")?;
    let patch_size = pictures.patch_size;

    let mut llava = LlavaConfig::new(LlmConfig::open(&llm_folder)?, &tower_folder)?;
    llava.llm_name.clone_from(&section.llm);
    tower.clone_into(&mut llava.mm_vision_tower);
    llava.mm_projector_type = section.mm_projector_type.unwrap_or_default();
    if let Some(layer) = &section.vision_feature_layer {
        llava.features.vision_feature_layer = layer.clone();
    }
    let changed = before.as_deref().map(|folder| trained_tower(folder, kind, resolve));
    let changed = changed.transpose().context("model.pretrained")?.unwrap_or_default();
    let (encoder, tower_weights) = if section.trains_vision_tower() {
        let opened = Encoder::open_trained(&tower_folder, changed, &llava.features, device, kind);
        let (encoder, weights) = opened.context("model.vision_tower")?;
        (encoder, Some(weights))
    } else {
        (Encoder::open_with(&tower_folder, changed, device, kind).context("model.vision_tower")?, None)
    };
    llava.vision_lora.clone_from(&section.vision_lora);
    llava.lora = section.lora.as_ref().map(|lora| lora.over(llava.llm.num_hidden_layers));

    let llm = Weights::open(&llm_folder, device, kind)?;
    let source = if section.freezes_llm() { in_few_bits(&llm, section)? } else { llm.trained() };
    let new = Weights::random(config.seed, device, kind);
    let model = Llava::assemble(llava, &source, encoder, &new).context("model")?;
    llm.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;
    let image_size = section.image_size;
    let (rows, cols) = model.image_grid(image_size, image_size).context("model.image_size")?;
    ensure!(
        (rows * patch_size, cols * patch_size) == (image_size, image_size),
        "model.image_size is {image_size}, it must be a multiple of the encoder's patch size, {patch_size}"
    );

    let parts = StudentParts { model: Box::new(model), trained: new, llm: Some(llm), llm_folder, pictures };
    let mut student = Student::from_parts(parts, config)?;
    if let Some(folder) = &before {
        parts::start_from(&student, folder).context("model.pretrained")?;
    }
    // Its weights have begun as those of the run before already.
    student.trained.extend(tower_weights.map(|weights| ("vision_tower.", weights)));
    Ok(student)
}

/// What the run before made of its encoder, which its projection has learned to read: the weights that it trained, or all of
/// them where it had adapters, with these folded in.
fn trained_tower(folder: &Path, kind: Kind, resolve: &Resolve<'_>) -> Result<Vec<(String, Tensor)>> {
    if LlavaConfig::open(folder)?.vision_lora.is_none() {
        return trained::vision_tower(folder);
    }
    let mut model = vora_model::open(folder, Device::Cpu, kind, resolve)?;
    model.merge()?;
    Ok(model.encoder().map(Encoder::current_tensors).unwrap_or_default())
}
