//! What learns and what it learns from: a VoRA over a frozen LLM, its distillation heads, and their frozen teacher.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_data::Batch;
use vora_llm::LlmConfig;
use vora_model::{Input, VisionLanguageModel, Vora, VoraConfig};
use vora_torch::Weights;
use vora_vision::{IMAGENET_DEFAULT, ImageProcessor, Resample, Teacher};

use crate::config::{DistillConfig, ModelConfig, TrainConfig};
use crate::distill::{DistillHeads, TeacherMean};
use crate::loss::cross_entropy;

/// Logits that exist at once while the loss is computed: 256 MiB of f32.
const MAX_LOGITS: i64 = 64 << 20;

/// Channels of the patch embedding where nothing says otherwise, as in the published model.
const EMBED_DIM: i64 = 1536;

/// A batch as tensors on the device.
#[derive(Debug)]
pub struct DeviceBatch {
    /// What the model takes.
    pub input: Input,
    /// `[n]`: supervised places in `batch * seq`.
    pub positions: Tensor,
    /// `[n]`: the right token at each.
    pub targets: Tensor,
    /// `[image tokens]`: places of patches in `batch * seq`.
    pub image_places: Tensor,
}

impl DeviceBatch {
    /// Uploads a batch.
    pub fn new(batch: &Batch, device: Device) -> Self {
        let supervised = batch.supervised();
        let list = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Self {
            input: Input {
                input_ids: list(&batch.input_ids).view([batch.batch, batch.seq]),
                pixel_values: batch.images.iter().map(|pixels| pixels.to_tensor().to_device(device)).collect(),
                spans: batch.spans.clone(),
            },
            positions: list(&supervised.positions),
            targets: list(&supervised.targets),
            image_places: list(&batch.spans.image_positions()),
        }
    }

    /// Supervised tokens.
    pub fn num_targets(&self) -> i64 {
        self.targets.size()[0]
    }

    /// Patches of all pictures.
    pub fn num_image_tokens(&self) -> i64 {
        self.image_places.size()[0]
    }
}

/// The losses of one forward pass, f32 scalars.
#[derive(Debug)]
pub struct Losses {
    /// Cross-entropy, summed over the supervised tokens.
    pub lm_sum: Tensor,
    /// Cosine loss, mean over blocks and image tokens; none without a teacher or a picture.
    pub distill: Option<Tensor>,
}

/// The teacher with all that serves to learn from it.
#[derive(Debug)]
pub struct Distill {
    teacher: Teacher,
    heads: DistillHeads,
    mean: Option<TeacherMean>,
}

/// The model in training.
#[derive(Debug)]
pub struct Student {
    /// The model.
    pub model: Vora,
    /// The teacher's side; none where the run has no teacher.
    pub distill: Option<Distill>,
    llm_folder: PathBuf,
    chat_template: Option<String>,
    processor: ImageProcessor,
    trained: Weights,
}

impl Student {
    /// Opens LLM and teacher and puts new adapters, a patch embedding and heads on them; `resolve` finds the folder
    /// of a model's name.
    pub fn new(
        config: &TrainConfig,
        device: Device,
        kind: Kind,
        resolve: &dyn Fn(&str) -> Result<PathBuf>,
    ) -> Result<Self> {
        let ModelConfig { llm, aux_vision, lora, patch_size, image_size, .. } = &config.model;
        ensure!(
            config.model.pretrained.is_none(),
            "model.pretrained: training goes on from a run's own checkpoints only (--resume); start without it"
        );
        let llm_folder = resolve(llm).context("model.llm")?;
        let teacher = match aux_vision {
            Some(name) => Some(
                resolve(name).and_then(|folder| Teacher::open(&folder, device, kind)).context("model.aux_vision")?,
            ),
            None => None,
        };
        if let Some(teacher) = &teacher {
            ensure!(
                teacher.patch_size() == *patch_size,
                "model.patch_size is {patch_size}, the teacher's patches have {}: their tokens could not meet",
                teacher.patch_size()
            );
        }
        let teacher_size = teacher.as_ref().map(Teacher::hidden_size);
        let embed_dim = config.model.vision_embedding_intermediate_size.or(teacher_size).unwrap_or(EMBED_DIM);

        let mut vora = VoraConfig::new(LlmConfig::open(&llm_folder)?, embed_dim, *patch_size, *image_size);
        ensure!(
            lora.layers <= vora.llm.num_hidden_layers as i64,
            "model.lora.layers is {}, {llm} has {} layers",
            lora.layers,
            vora.llm.num_hidden_layers
        );
        vora.llm_name.clone_from(llm);
        vora.aux_vision = aux_vision.clone().unwrap_or_default();
        vora.vision_attention = config.model.vision_attention;
        vora.lora = Some(lora.clone());
        let frozen = Weights::open(&llm_folder, device, kind)?;
        let trained = Weights::random(config.seed, device, kind);
        let model = Vora::assemble(vora, &frozen, &trained)?;
        frozen.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;

        let side = u32::try_from(*image_size)?;
        let processor = match &teacher {
            Some(teacher) => teacher.processor().at(side),
            None => ImageProcessor::square(side, IMAGENET_DEFAULT.0, IMAGENET_DEFAULT.1, Resample::Bicubic),
        };
        if let (Some(teacher), true) = (&teacher, config.model.starts_from_teacher()) {
            model.vision_embedding().start_from_teacher(teacher, word_embedding_rms(&model))?;
        }
        let distill = teacher.map(|teacher| Distill::new(teacher, &model, &config.distill, &trained)).transpose()?;
        let chat_template = config.model.chat_template.clone();
        Ok(Self { model, distill, llm_folder, chat_template, processor, trained })
    }

    /// Where the frozen LLM lies.
    pub fn llm_folder(&self) -> &Path {
        &self.llm_folder
    }

    /// What stands in place of the LLM's own chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// What pictures go through.
    pub fn processor(&self) -> &ImageProcessor {
        &self.processor
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.model.llm().device()
    }

    /// Everything trained, by its name on disk.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.trained.parameters()
    }

    /// One forward pass: both losses, as sums and means that micro-batches can be put together from.
    pub fn losses(&self, batch: &DeviceBatch) -> Result<Losses> {
        let distill = self.distill.as_ref().filter(|_| batch.num_image_tokens() > 0);
        let hidden_layers = distill.map_or(0, |distill| distill.heads.hidden_layers());
        let output = self.model.forward(&batch.input, hidden_layers)?;
        let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &batch.positions); // [n, hidden]
        let chunk = (MAX_LOGITS / self.model.config().llm.vocab_size).max(1);
        let lm_sum = cross_entropy(&hidden, &batch.targets, chunk, |rows| self.model.llm().logits(rows));
        let distill = distill.map(|distill| {
            let targets = distill.targets(&batch.input.pixel_values)?;
            let losses = distill.heads.losses(&output.hidden_states, &batch.image_places, &targets); // [blocks]
            anyhow::Ok(losses.mean(Kind::Float))
        });
        Ok(Losses { lm_sum, distill: distill.transpose()? })
    }

    /// Logits at the supervised places, `[n, vocab]`, for evaluation.
    pub fn answer_logits(&self, batch: &DeviceBatch) -> Result<Tensor> {
        let output = self.model.forward(&batch.input, 0)?;
        let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &batch.positions);
        Ok(self.model.llm().logits(&hidden))
    }
}

impl Distill {
    fn new(teacher: Teacher, model: &Vora, config: &DistillConfig, trained: &Weights) -> Result<Self> {
        let lora_layers = model.config().lora.as_ref().map_or(0, |lora| lora.layers);
        let blocks = usize::try_from(lora_layers)?.min(teacher.num_hidden_layers());
        let hidden_size = model.config().llm.hidden_size;
        let weights = trained.pp("aux_vision");
        let heads = DistillHeads::load(blocks, hidden_size, teacher.hidden_size(), config.pairing, &weights)?;
        Ok(Self { teacher, heads, mean: None })
    }

    /// Measures what is always the same in the teacher's features, over pictures `[n, 3, height, width]`.
    pub fn measure_mean(&mut self, pictures: &[Tensor], center: bool) -> Result<()> {
        let features = |batch: &Tensor| Ok(self.features(batch));
        self.mean = Some(tch::no_grad(|| TeacherMean::measure(pictures, center, features))?);
        Ok(())
    }

    /// What was measured, or loaded.
    pub fn mean(&self) -> Option<&TeacherMean> {
        self.mean.as_ref()
    }

    /// Takes what was measured before.
    pub fn set_mean(&mut self, mean: TeacherMean) {
        self.mean = Some(mean);
    }

    /// The outputs of the teacher's blocks that have heads, each `[pictures, patches, teacher_hidden]` in f32.
    fn features(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        let states = self.teacher.patch_states(pixel_values, self.heads.hidden_layers());
        states[1..].iter().map(|state| state.to_kind(Kind::Float)).collect()
    }

    /// What the heads are to match, per block `[image tokens, teacher_hidden]`, in the order of the pictures.
    fn targets(&self, pixel_values: &[Tensor]) -> Result<Vec<Tensor>> {
        tch::no_grad(|| {
            let mut blocks: Vec<Vec<Tensor>> = (0..self.heads.hidden_layers()).map(|_| Vec::new()).collect();
            for group in pixel_values.chunk_by(|a, b| a.size() == b.size()) {
                let mut features = self.features(&Tensor::stack(group, 0));
                if let Some(mean) = &self.mean {
                    features = mean.center(features)?;
                }
                for (block, features) in blocks.iter_mut().zip(features) {
                    block.push(features.flatten(0, 1));
                }
            }
            Ok(blocks.iter().map(|groups| Tensor::cat(groups, 0)).collect())
        })
    }
}

/// Root of the mean square over the word embeddings, from some thousands of them.
fn word_embedding_rms(model: &Vora) -> f64 {
    let vocab = model.config().llm.vocab_size;
    let ids = Tensor::arange_start_step(0, vocab, (vocab / 4096).max(1), (Kind::Int64, model.llm().device()));
    model.llm().embed(&ids).to_kind(Kind::Float).square().mean(Kind::Float).sqrt().double_value(&[])
}
