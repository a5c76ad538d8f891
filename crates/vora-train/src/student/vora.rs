//! A VoRA to train: new adapters and a patch embedding on a frozen LLM, taught by a frozen vision transformer.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_model::{VisionLanguageModel, Vora, VoraConfig};
use vora_torch::Weights;
use vora_vision::{IMAGENET_DEFAULT, ImageProcessor, Resample, Teacher};

use super::{Distill, Resolve, Student};
use crate::config::TrainConfig;

/// Channels of the patch embedding where nothing says otherwise, as in the published model.
const EMBED_DIM: i64 = 1536;

/// Opens LLM and teacher and puts new adapters, a patch embedding and heads on them.
pub(super) fn student(config: &TrainConfig, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Student> {
    let section = &config.model;
    let (llm, image_size) = (&section.llm, section.image_size);
    let patch_size = section.patch_size.context("model.patch_size is missing")?;
    let lora = section.lora.clone().context("model.lora is missing")?;
    ensure!(
        section.pretrained.is_none(),
        "model.pretrained: training goes on from a run's own checkpoints only (--resume); start without it"
    );
    let llm_folder = resolve(llm).context("model.llm")?;
    let open_teacher = |name: &String| {
        resolve(name).and_then(|folder| Teacher::open(&folder, device, kind)).context("model.aux_vision")
    };
    let teacher = section.aux_vision.as_ref().map(open_teacher).transpose()?;
    if let Some(teacher) = &teacher {
        ensure!(
            teacher.patch_size() == patch_size,
            "model.patch_size is {patch_size}, the teacher's patches have {}: their tokens could not meet",
            teacher.patch_size()
        );
    }
    let teacher_size = teacher.as_ref().map(Teacher::hidden_size);
    let embed_dim = section.vision_embedding_intermediate_size.or(teacher_size).unwrap_or(EMBED_DIM);

    let mut vora = VoraConfig::new(LlmConfig::open(&llm_folder)?, embed_dim, patch_size, image_size);
    ensure!(
        lora.layers <= vora.llm.num_hidden_layers as i64,
        "model.lora.layers is {}, {llm} has {} layers",
        lora.layers,
        vora.llm.num_hidden_layers
    );
    let (blocks, hidden_size) = (usize::try_from(lora.layers)?, vora.llm.hidden_size);
    vora.llm_name.clone_from(llm);
    vora.aux_vision = section.aux_vision.clone().unwrap_or_default();
    vora.vision_attention = section.vision_attention.unwrap_or_default();
    vora.lora = Some(lora);
    let frozen = Weights::open(&llm_folder, device, kind)?;
    let trained = Weights::random(config.seed, device, kind);
    let model = Vora::assemble(vora, &frozen, &trained)?;
    frozen.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;

    let side = u32::try_from(image_size)?;
    let processor = match &teacher {
        Some(teacher) => teacher.processor().at(side),
        None => ImageProcessor::square(side, IMAGENET_DEFAULT.0, IMAGENET_DEFAULT.1, Resample::Bicubic),
    };
    if let (Some(teacher), true) = (&teacher, section.starts_from_teacher()) {
        model.vision_embedding().start_from_teacher(teacher, word_embedding_rms(&model))?;
    }
    let distill = teacher.map(|teacher| Distill::new(teacher, blocks, hidden_size, &config.distill, &trained));
    Ok(Student {
        model: Box::new(model),
        distill: distill.transpose()?,
        llm_name: llm.clone(),
        llm_folder,
        chat_template: section.chat_template.clone(),
        processor,
        patch_size,
        z_loss: 0.0,
        trained: vec![("", trained)],
        made: Vec::new(),
    })
}

/// Root of the mean square over the word embeddings, from some thousands of them.
fn word_embedding_rms(model: &Vora) -> f64 {
    let vocab = model.config().llm.vocab_size;
    let ids = Tensor::arange_start_step(0, vocab, (vocab / 4096).max(1), (Kind::Int64, model.llm().device()));
    model.llm().embed(&ids).to_kind(Kind::Float).square().mean(Kind::Float).sqrt().double_value(&[])
}
