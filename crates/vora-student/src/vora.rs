//! A VoRA to train, taught by a frozen vision transformer: adapters and a patch embedding on a frozen LLM, or all
//! weights of one whose adapters were merged.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_image::Aspect;
use vora_llm::{LlmConfig, VisionAttention};
use vora_model::{VisionEmbedding, VisionEmbeddingType, VisionLanguageModel, Vora, VoraConfig};
use vora_recipe::{DataPreprocess, ModelConfig, TeacherStart};
use vora_torch::weights::Weights;
use vora_vision::{Encoder, EncoderConfig, PositionTable};

use vora_model::Resolve;

use crate::opening::Opening;
use crate::{Student, StudentParts, parts};

/// Channels of the patch embedding where nothing says otherwise, as in the published model.
const EMBED_DIM: i64 = 1536;

/// Opens LLM and teacher, and what was trained before; makes what is new: adapters, patch embedding, heads.
pub(crate) fn student(opening: Opening<'_>) -> Result<Student> {
    let Opening { config, ref llm_folder, ref pictures, device, kind, resolve, .. } = opening;
    let section = &config.model;
    let (llm, image_size) = (&section.llm, section.image_size);
    let patch_size = pictures.patch_size;
    let keeps_shape = matches!(pictures.processor.aspect(), Aspect::Keep(_));
    let teacher_folder = section.aux_vision.as_deref().map(resolve).transpose().context("model.aux_vision")?;
    let is_outline = opening.is_outline(&teacher_folder);
    let teacher = teacher_folder.as_ref().map(|folder| opening.teacher(folder, is_outline)).transpose()?;
    if let Some(teacher) = &teacher {
        ensure!(
            image_size % teacher.patch_size() == 0,
            "model.image_size is {image_size}, it must be a multiple of the teacher's patch size, {}",
            teacher.patch_size()
        );
        ensure!(
            !keeps_shape || patch_size % teacher.patch_size() == 0,
            "model.patch_size is {patch_size}, where pictures keep their shape (max_image_tokens) it must be a multiple of \
             the teacher's, {}, so that both see the same of them",
            teacher.patch_size()
        );
    }
    if let (Some(folder), Some(true)) = (&teacher_folder, section.skip_aux_cls) {
        ensure!(
            EncoderConfig::open(folder)?.num_prefix_tokens() > 0,
            "model.skip_aux_cls is true, but the teacher {} has no class token: its first patch would be skipped",
            folder.display()
        );
    }
    let llm_config = LlmConfig::open(llm_folder)?;
    let open_pretrained = |name: &String| Pretrained::open(name, section, &llm_config, resolve);
    let pretrained = section.pretrained.as_ref().map(open_pretrained).transpose().context("model.pretrained")?;
    let before = pretrained.as_ref().map(|pretrained| &pretrained.config);
    let vision_embedding =
        section.vision_embedding.or(before.map(|config| config.vision_embedding)).unwrap_or_default();
    let of_teacher = teacher.as_ref().map(Encoder::hidden_size);
    let unsaid = match vision_embedding {
        VisionEmbeddingType::Aimv2 => of_teacher.unwrap_or(EMBED_DIM),
        VisionEmbeddingType::Gemma4Unified => llm_config.hidden_size, // as the published one has it
    };
    let embed_dim = section
        .vision_embedding_intermediate_size
        .or(before.map(|config| config.vision_embedding_intermediate_size))
        .unwrap_or(unsaid);

    let mut vora = VoraConfig::new(llm_config, embed_dim, patch_size, image_size);
    let lora = section.adapters().map(|lora| lora.over(vora.llm.num_hidden_layers));
    let layers = lora.as_ref().map_or(vora.llm.num_hidden_layers as i64, |lora| lora.layers);
    ensure!(
        layers <= vora.llm.num_hidden_layers as i64,
        "model.lora.layers is {layers}, {llm} has {} layers",
        vora.llm.num_hidden_layers
    );
    vora.vision_embedding = vision_embedding;
    vora.llm_name.clone_from(llm);
    vora.aux_vision = section.aux_vision.clone().unwrap_or_default();
    if let Some(before) = before {
        (vora.vision_attention, vora.pos_embed) = (before.vision_attention, before.pos_embed);
        vora.biases.clone_from(&before.biases);
    }
    vora.vision_attention = section.vision_attention.unwrap_or(vora.vision_attention);
    vora.vision_attention = match (vora.vision_attention, section.fuse_adjacent_images) {
        (VisionAttention::Bidirectional, Some(true)) => VisionAttention::BidirectionalFused,
        (VisionAttention::BidirectionalFused, Some(false)) => VisionAttention::Bidirectional,
        (attention, _) => attention,
    };
    vora.pos_embed = section.pos_embed.unwrap_or(vora.pos_embed);
    ensure!(
        !(keeps_shape && vora.pos_embed == PositionTable::FirstRows),
        "model.pos_embed is first_rows, which knows no shape but the square; with max_image_tokens it must be interpolate"
    );
    vora.lora.clone_from(&lora);
    let is_whole = !section.freezes_llm();
    let weights = match &pretrained {
        Some(pretrained) if lora.is_none() => {
            // Biases of adapted layers are trained, whether or not the rest of the LLM is.
            let is_trained = |name: &str| is_whole || !pretrained.config.has_layer_bias(name);
            Weights::from_tensors(pretrained.llm().filter(|(name, _)| is_trained(name)), device, kind)
        }
        _ => opening.llm(is_outline)?,
    };
    let source = if is_whole { weights.trained() } else { opening.frozen(&weights)? };
    let trained = opening.new_weights(is_outline);
    let model = Vora::assemble(vora, &source, &trained)?;
    weights.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;

    let is_new = pretrained.is_none() && !is_outline;
    if let (VisionEmbedding::Gemma4Unified(embedder), true) = (model.vision_embedding(), is_new) {
        embedder.scale_to(word_embedding_rms(&model));
    }
    if let (VisionEmbedding::Aimv2(embedding), Some(teacher), true) =
        (model.vision_embedding(), &teacher, section.starts_from_teacher() && is_new)
    {
        let is_published = config.data.train.data_preprocess.as_ref().is_some_and(DataPreprocess::is_published);
        let fits = teacher.preprocessor().next().is_some();
        let unsaid = if is_published && fits { TeacherStart::Copied } else { TeacherStart::Scaled };
        match section.reuse_aux_vision_start.unwrap_or(unsaid) {
            TeacherStart::Scaled => embedding.start_from_teacher(teacher, word_embedding_rms(&model))?,
            TeacherStart::Copied => embedding.copy_from_teacher(teacher).context("model.reuse_aux_vision_start")?,
        }
    }
    let llm = is_whole.then_some(weights);
    let Opening { llm_folder, pictures, .. } = opening;
    let parts = StudentParts { model: Box::new(model), trained: trained.clone(), llm, llm_folder, pictures };
    let mut student = Student { is_whole: lora.is_none(), is_outline, ..Student::from_parts(parts, config)? };
    if let Some(teacher) = teacher {
        student = student.taught(Box::new(teacher), config)?;
    }
    if let (Some(distill), Some(folder), Some(cache)) = (&mut student.distill, &teacher_folder, config.teacher_cache())
    {
        distill.keep_features(cache, folder, "", device, kind).context("distill.cache")?;
    }
    if let Some(pretrained) = pretrained.filter(|_| !is_outline) {
        pretrained.start(&trained.parameters()).context("model.pretrained")?;
    }
    Ok(student)
}

/// A VoRA that was trained before: a merged folder, or a run's `final/`.
struct Pretrained {
    folder: PathBuf,
    config: VoraConfig,
    tensors: Vec<(String, Tensor)>,
}

impl Pretrained {
    /// Opens it, with its adapters merged where the run has none.
    fn open(name: &str, section: &ModelConfig, llm: &LlmConfig, resolve: &Resolve<'_>) -> Result<Self> {
        let folder = resolve(name)?;
        let mut config = VoraConfig::open(&folder)?;
        let mut model = vora_model::open(&folder, Device::Cpu, Kind::Float, resolve)?;
        match (section.adapters(), &config.lora) {
            (None, _) => model.merge()?,
            (Some(lora), Some(before)) => {
                let same = lora.over(llm.num_hidden_layers).is_same(before);
                ensure!(same, "the adapters of {name} are {before:?}, those of model.lora {lora:?}");
            }
            (Some(_), None) => bail!(
                "{name} is merged, it has no adapters to go on with; leave model.lora out and set model.freeze_llm=false \
                 to train all its weights"
            ),
        }
        if let Some(asked) = section.vision_embedding {
            let (ours, theirs) = (asked.name(), config.vision_embedding.name());
            ensure!(ours == theirs, "model.vision_embedding is {ours}, {name} was trained with {theirs}");
        }
        for (key, ours, theirs) in [
            ("model.image_size", section.image_size, config.image_size),
            ("model.patch_size", section.patch_size.unwrap_or(config.patch_size), config.patch_size),
            ("hidden_size of model.llm", llm.hidden_size, config.llm.hidden_size),
            ("vocab_size of model.llm", llm.vocab_size, config.llm.vocab_size),
        ] {
            ensure!(ours == theirs, "{key} is {ours}, {name} was trained with {theirs}");
        }
        // Whether layers have biases of their own is for the folder's tensors to say.
        let tensors = model.tensors()?;
        let has_biases =
            tensors.iter().any(|(name, _)| name.strip_prefix("llm.").is_some_and(|n| config.has_layer_bias(n)));
        config.biases = config.biases.filter(|_| has_biases);
        Ok(Self { tensors, folder, config })
    }

    /// The LLM's tensors by its own names.
    fn llm(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix("llm.")?.to_owned(), t.shallow_clone())))
    }

    /// Puts its values into the parameters of its names. The teacher's heads are new where it has none that fit.
    fn start(&self, parameters: &[(String, Tensor)]) -> Result<()> {
        let heads = parts::heads(&self.folder)?;
        for (name, parameter) in parameters {
            let found = self.tensors.iter().chain(&heads).find(|(other, _)| other == name);
            match found {
                Some((_, value)) if value.size() == parameter.size() => {
                    tch::no_grad(|| parameter.shallow_clone().copy_(value));
                }
                _ if name.starts_with("aux_vision.") => {}
                found => bail!(
                    "`{name}` is {:?} in {}, this run expects {:?}",
                    found.map(|(_, value)| value.size()),
                    self.folder.display(),
                    parameter.size()
                ),
            }
        }
        Ok(())
    }
}

/// Root of the mean square over the word embeddings, from some thousands of them.
fn word_embedding_rms(model: &Vora) -> f64 {
    let vocab = model.config().llm.vocab_size;
    let ids = Tensor::arange_start_step(0, vocab, (vocab / 4096).max(1), (Kind::Int64, model.llm().device()));
    model.llm().embed(&ids).to_kind(Kind::Float).square().mean(Kind::Float).sqrt().double_value(&[])
}
