//! A LLaVA to train: a new projection from an encoder into an LLM, each of which is frozen, adapted or trained whole.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_model::{Llava, LlavaConfig, VisionLanguageModel, trained};
use vora_vision::Encoder;

use vora_model::Resolve;

use crate::opening::Opening;
use crate::{Student, StudentParts, parts};

/// Opens LLM and encoder and puts a new projection, and adapters where asked for, between and on them.
pub(crate) fn student(opening: Opening<'_>, tower: &str) -> Result<Student> {
    let Opening { config, ref llm_folder, ref pictures, device, kind, resolve, .. } = opening;
    let section = &config.model;
    let tower_folder = resolve(tower).context("model.vision_tower")?;
    let before = section.pretrained.as_deref().map(resolve).transpose().context("model.pretrained")?;
    let patch_size = pictures.patch_size;

    let mut llava = LlavaConfig::new(LlmConfig::open(llm_folder)?, &tower_folder)?;
    llava.llm_name.clone_from(&section.llm);
    tower.clone_into(&mut llava.mm_vision_tower);
    llava.mm_projector_type = section.mm_projector_type.unwrap_or_default();
    if let Some(layer) = &section.vision_feature_layer {
        llava.features.vision_feature_layer = layer.clone();
    }
    let changed = before.as_deref().map(|folder| trained_tower(folder, kind, resolve));
    let changed = changed.transpose().context("model.pretrained")?.unwrap_or_default();
    let is_outline = !section.trains_vision_tower() && before.is_none() && opening.is_outline([&tower_folder]);
    let (encoder, tower_weights) = if is_outline {
        (Encoder::outline(&tower_folder, kind).context("model.vision_tower")?, None)
    } else if section.trains_vision_tower() {
        let opened = Encoder::open_trained(&tower_folder, changed, &llava.features, device, kind);
        let (encoder, weights) = opened.context("model.vision_tower")?;
        (encoder, Some(weights))
    } else {
        (Encoder::open_with(&tower_folder, changed, device, kind).context("model.vision_tower")?, None)
    };
    llava.vision_lora.clone_from(&section.vision_lora);
    llava.lora = section.lora.as_ref().map(|lora| lora.over(llava.llm.num_hidden_layers));

    let llm = opening.llm(is_outline)?;
    let source = if section.freezes_llm() { opening.frozen(&llm)? } else { llm.trained() };
    let new = opening.new_weights(is_outline);
    let model = Llava::assemble(llava, &source, encoder, &new).context("model")?;
    llm.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;
    let image_size = section.image_size;
    let (rows, cols) = model.image_grid(image_size, image_size).context("model.image_size")?;
    ensure!(
        (rows * patch_size, cols * patch_size) == (image_size, image_size),
        "model.image_size is {image_size}, it must be a multiple of the encoder's patch size, {patch_size}"
    );

    let Opening { llm_folder, pictures, .. } = opening;
    let parts = StudentParts { model: Box::new(model), trained: new, llm: Some(llm), llm_folder, pictures };
    let mut student = Student { is_outline, ..Student::from_parts(parts, config)? };
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
