//! What learns and what it learns from: a model that sees in one of the ways known here and, for a VoRA, its
//! distillation heads and their frozen teacher.

mod chameleon;
pub mod heads;
mod llava;
pub mod parts;
mod teacher_cache;
mod vora;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_data::{Batch, Preparation};
use vora_llm::{DropoutSeed, LlmConfig, Recompute};
use vora_model::{Input, Resolve, VisionLanguageModel};
use vora_torch::weights::Weights;
use vora_vision::Teacher;

use self::heads::{DistillHeads, TeacherMean, resample};
use self::teacher_cache::TeacherCache;
use crate::config::distill::{DistillConfig, Pairing};
use crate::config::model::ModelType;
use crate::config::run::TrainConfig;
use crate::data;
use vora_torch::loss::cross_entropy_and_z_loss;

/// Logits that exist at once while the loss is computed: 256 MiB of f32.
pub(crate) const MAX_LOGITS: i64 = 64 << 20;

/// Pixels of one channel that the teacher looks at at once: sixteen pictures of 448 x 448.
const MAX_TEACHER_PIXELS: i64 = 16 * 448 * 448;

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
                pixel_values: batch
                    .images
                    .iter()
                    .map(|pixels| vora_vision::pixel_values(pixels).to_device(device))
                    .collect(),
                spans: batch.spans.clone(),
            },
            positions: list(&supervised.positions),
            targets: list(&supervised.targets),
            image_places: list(&batch.spans.image_positions()),
        }
    }

    /// Patches of all pictures.
    pub fn num_image_tokens(&self) -> i64 {
        self.image_places.size()[0]
    }
}

/// The losses of one forward pass, f32 scalars.
#[derive(Debug)]
pub struct Losses<'a> {
    /// Cross-entropy, and z-loss where the run has it, summed over [`Student::num_targets`] tokens.
    pub lm_sum: Tensor,
    /// Cosine loss, mean over blocks and image tokens; none without a teacher or a picture.
    pub distill: Option<Tensor>,
    /// `[blocks]`: the cosine loss of each, without a graph.
    pub distill_blocks: Option<Tensor>,
    /// What goes backward once the losses have: the layers, in a run with activation checkpointing.
    pub recompute: Option<Recompute<'a>>,
}

/// The teacher with all that serves to learn from it.
#[derive(Debug)]
pub struct Distill {
    teacher: Teacher,
    heads: DistillHeads,
    states: Vec<usize>, // which of the teacher's each head meets, 0 being what goes into its first block
    patch_size: i64,    // the student's
    mean: Option<TeacherMean>,
    cache: Option<TeacherCache>,
}

/// The model in training.
#[derive(Debug)]
pub struct Student {
    /// The model.
    pub model: Box<dyn VisionLanguageModel>,
    /// The teacher's side; none where the run has no teacher.
    pub distill: Option<Distill>,
    llm_name: String,
    llm_folder: PathBuf,
    preparation: Preparation,
    chat_template: Option<String>,
    z_loss: f64,
    is_whole: bool,
    gradient_checkpointing: bool,
    trained: Vec<(&'static str, Weights)>, // sources that handed out parameters, and where in the folder they stand
    made: Vec<(String, Tensor)>,
}

impl Student {
    /// Opens what `config.model` names and makes what it trains.
    ///
    /// # Errors
    /// Names the key, and the file, that does not fit.
    pub fn new(config: &TrainConfig, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Self> {
        let llm_folder = data::llm_folder(config, resolve)?;
        let preparation = data::preparation_over(&llm_folder, config, resolve)?;
        match config.model.model_type {
            ModelType::Vora => vora::student(config, llm_folder, preparation, device, kind, resolve),
            ModelType::Llava => llava::student(config, llm_folder, preparation, device, kind, resolve),
            ModelType::Chameleon => chameleon::student(config, llm_folder, preparation, device, kind),
        }
    }

    /// The name that the run file knows the LLM by.
    pub fn llm_name(&self) -> &str {
        &self.llm_name
    }

    /// Where the LLM lies, with its tokenizer and chat template.
    pub fn llm_folder(&self) -> &Path {
        &self.llm_folder
    }

    /// What makes its input out of words and pictures.
    pub fn preparation(&self) -> &Preparation {
        &self.preparation
    }

    /// Whether what is saved is the whole model: a VoRA without adapters, all of whose weights are trained, or which goes
    /// on from a merged one.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// What stands in place of the LLM's own chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.model.llm().device()
    }

    /// Everything trained, by its name on disk.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let of = |(prefix, weights): &(&str, Weights)| {
            weights.parameters().into_iter().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor)).collect()
        };
        self.trained.iter().flat_map::<Vec<_>, _>(of).collect()
    }

    /// What the run makes before its first step and no step changes, by its name on disk: a Chameleon's image tokenizer.
    pub fn made(&self) -> &[(String, Tensor)] {
        &self.made
    }

    /// Tokens that the language loss is summed over: supervised words, and the pictures' tokens where the model writes
    /// them.
    pub fn num_targets(&self, batch: &DeviceBatch) -> i64 {
        batch.targets.size()[0] + if self.writes_pictures() { batch.num_image_tokens() } else { 0 }
    }

    /// Whether the model learns to write pictures as well as words.
    pub(crate) fn writes_pictures(&self) -> bool {
        self.model.image_writer().is_some()
    }

    /// What goes into the decoder, `[batch, seq, hidden]`, the places in `batch * seq` that are learned to predict from,
    /// and the right tokens.
    fn learned(&self, batch: &DeviceBatch) -> Result<(Tensor, Tensor, Tensor)> {
        let (positions, targets) = (batch.positions.shallow_clone(), batch.targets.shallow_clone());
        let Some(writer) = self.model.image_writer().filter(|_| batch.num_image_tokens() > 0) else {
            return Ok((self.model.embed(&batch.input)?, positions, targets));
        };
        // Pictures are encoded once: their tokens are read, and are learned to be written.
        let tokens = writer.image_tokens(&batch.input.pixel_values)?; // [image tokens]
        let (made, places) = (tokens.size()[0], batch.num_image_tokens());
        ensure!(made == places, "the pictures make {made} tokens, the text has places for {places}");
        let input_ids = &batch.input.input_ids;
        let input_ids = input_ids.flatten(0, 1).index_copy(0, &batch.image_places, &tokens).view_as(input_ids);
        // A picture's first token follows the mark that begins it.
        let before = &batch.image_places - 1;
        let (positions, targets) = (Tensor::cat(&[positions, before], 0), Tensor::cat(&[targets, tokens], 0));
        Ok((self.model.llm().embed(&input_ids), positions, targets))
    }

    /// One forward pass: both losses, as sums and means that micro-batches can be put together from. `seed` decides what
    /// the LLM's dropout drops, where its config has one.
    pub fn losses(&self, batch: &DeviceBatch, seed: DropoutSeed) -> Result<Losses<'_>> {
        let distill = self.distill.as_ref().filter(|_| batch.num_image_tokens() > 0);
        let hidden_layers = distill.map_or(0, |distill| distill.heads.hidden_layers());
        let (inputs_embeds, positions, targets) = self.learned(batch)?;
        let (llm, plan) = (self.model.llm(), self.model.plan(&batch.input.spans)?);
        let (output, recompute) = if self.gradient_checkpointing {
            let (output, recompute) = llm.forward_recomputed(&inputs_embeds, plan, hidden_layers, seed);
            (output, Some(recompute))
        } else {
            (llm.forward_train(&inputs_embeds, &plan, hidden_layers, seed), None)
        };
        let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &positions); // [n, hidden]
        // The gradient of a head that is trained comes from all rows at once.
        let chunk = if llm.trains_head() { i64::MAX } else { (MAX_LOGITS / llm.config().vocab_size).max(1) };
        let lm_sum = cross_entropy_and_z_loss(&hidden, &targets, chunk, self.z_loss, |rows| llm.logits(rows));
        let distill = distill.map(|distill| {
            let targets = distill.targets(&batch.input.pixel_values)?;
            let losses = distill.heads.losses(&output.hidden_states, &batch.image_places, &targets); // [blocks]
            anyhow::Ok((losses.mean(Kind::Float), losses.detach()))
        });
        let (distill, distill_blocks) = distill.transpose()?.unzip();
        Ok(Losses { lm_sum, distill, distill_blocks, recompute })
    }

    /// Per block what the teacher has at the image tokens and what the head makes of them there, each
    /// `[image tokens, teacher_hidden]` in f32; none without a teacher or a picture.
    pub fn block_features(&self, batch: &DeviceBatch) -> Result<Option<Vec<(Tensor, Tensor)>>> {
        let Some(distill) = self.distill.as_ref().filter(|_| batch.num_image_tokens() > 0) else { return Ok(None) };
        let output = self.model.forward(&batch.input, distill.heads.hidden_layers())?;
        let students = distill.heads.outputs(&output.hidden_states, &batch.image_places);
        Ok(Some(distill.targets(&batch.input.pixel_values)?.into_iter().zip(students).collect()))
    }

    /// Logits at the supervised places, `[n, vocab]`, for evaluation.
    pub fn answer_logits(&self, batch: &DeviceBatch) -> Result<Tensor> {
        let output = self.model.forward(&batch.input, 0)?;
        let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &batch.positions);
        Ok(self.model.llm().logits(&hidden))
    }
}

impl Distill {
    /// Heads between `layers` of the student's blocks, of `num_hidden_layers`, and the teacher's, or as
    /// `distill.blocks` has them, on hidden states of `hidden_size`; a patch of the student's is `patch_size` wide.
    fn new(
        teacher: Teacher,
        layers: usize,
        llm: &LlmConfig,
        patch_size: i64,
        config: &DistillConfig,
        trained: &Weights,
    ) -> Result<Self> {
        let (students, teachers) = (llm.num_hidden_layers, teacher.num_hidden_layers());
        let pairing = config.pairing.unwrap_or_default();
        // The released code has a head for each of the teacher's blocks, however many layers are adapted.
        let (first, layers) = match pairing {
            Pairing::Output => (1, layers),
            Pairing::Input => (teacher.first_hidden_state(), students),
        };
        let pairs = match &config.blocks {
            Some(blocks) => blocks.iter().map(|(student, teacher)| (*student, *teacher)).collect(),
            None => (0..layers.min(teachers)).map(|block| (block, block)).collect::<Vec<_>>(),
        };
        for &(student, teacher) in &pairs {
            ensure!(student < students, "distill.blocks has the LLM's block {student}, it has {students} from 0 on");
            ensure!(
                teacher < teachers,
                "distill.blocks gives block {student} the teacher's {teacher}, it has {teachers} from 0 on"
            );
        }
        let weights = trained.pp("aux_vision");
        let heads = DistillHeads::load(pairs, llm.hidden_size, teacher.hidden_size(), pairing, &weights)?;
        let states = heads.teacher_blocks().map(|block| block + first).collect();
        Ok(Self { teacher, heads, states, patch_size, mean: None, cache: None })
    }

    /// The teacher, to be counted.
    pub(crate) fn teacher(&self) -> &Teacher {
        &self.teacher
    }

    /// How many heads there are.
    pub(crate) fn num_heads(&self) -> usize {
        self.states.len()
    }

    /// Keeps the teacher's features in `folder`; the teacher was opened from `teacher`.
    fn keep_features(&mut self, folder: &Path, teacher: &Path, device: Device, kind: Kind) -> Result<()> {
        self.cache = Some(TeacherCache::open(folder, teacher, &self.states, device, kind)?);
        Ok(())
    }

    /// Bytes that a picture of `height` x `width` takes in the cache; none without one.
    pub(crate) fn cached_bytes(&self, height: i64, width: i64, kind: Kind) -> Option<u64> {
        let patches = (height / self.teacher.patch_size()) * (width / self.teacher.patch_size());
        let elements = self.num_heads() as u64 * patches as u64 * self.teacher.hidden_size() as u64;
        self.cache.as_ref().map(|_| elements * kind.elt_size_in_bytes() as u64)
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

    /// The outputs of the teacher's blocks that heads meet, on the student's grid, each
    /// `[pictures, patches, teacher_hidden]` in f32.
    fn features(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        let states = match &self.cache {
            Some(cache) => cache.features(pixel_values, |pictures| self.look(pictures)),
            None => self.look(pixel_values),
        };
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let grid = |patch_size| (height / patch_size, width / patch_size);
        let (from, to) = (grid(self.teacher.patch_size()), grid(self.patch_size));
        states.iter().map(|state| resample(&state.to_kind(Kind::Float), from, to)).collect()
    }

    /// The same as the teacher computes it, on its own grid and in its kind: in parts where there is much to see.
    fn look(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let layers = self.states.iter().copied().max().unwrap_or(0);
        let mut blocks: Vec<Vec<Tensor>> = self.states.iter().map(|_| Vec::new()).collect();
        for part in pixel_values.split((MAX_TEACHER_PIXELS / (height * width)).max(1), 0) {
            let states = self.teacher.patch_states(&part, layers);
            for (parts, &state) in blocks.iter_mut().zip(&self.states) {
                parts.push(states[state].shallow_clone());
            }
        }
        let whole =
            |parts: Vec<Tensor>| if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(&parts, 0) };
        blocks.into_iter().map(whole).collect()
    }

    /// What the heads are to match, per block `[image tokens, teacher_hidden]`, in the order of the pictures.
    fn targets(&self, pixel_values: &[Tensor]) -> Result<Vec<Tensor>> {
        tch::no_grad(|| {
            let mut blocks: Vec<Vec<Tensor>> = self.states.iter().map(|_| Vec::new()).collect();
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
