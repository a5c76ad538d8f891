//! What a run takes of memory, counted: parameters and what stays from step to step from the model itself, once it is
//! opened and before anything is made for training; activations from the shapes of its first batch.

use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Serialize;
use tch::{Device, Kind};
use vora_data::{Loader, LoaderConfig, Source};
use vora_llm::LayerSizes;
use vora_model::VisionLanguageModel;
use vora_recipe::TrainConfig;
use vora_torch::dist::BUCKET_BYTES;
use vora_torch::optim::BROADCAST_BYTES;
use vora_torch::runtime::{available_memory, memory};
use vora_torch::weights::QuantizedWeight;

use crate::run::batch_shape::BatchShape;
use crate::run::blocks::Blocks;
use crate::run::max_steps::max_steps;
use crate::run::parameters::{Adapted, Parameters, in_few_bits};
use crate::run::work;
use vora_student::{Student, logits_rows};

/// What a run takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Size {
    /// Elements of what is trained and what is not.
    pub parameters: Parameters,
    /// The linear layers that carry adapters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<Adapted>,
    /// The LLM's blocks.
    pub blocks: Vec<Blocks>,
    /// The first batch: all others are taken to be like it.
    pub batch: BatchShape,
    /// Passes forward and back in a step: `gradient_accumulation_steps`.
    pub passes: u64,
    /// Floating-point operations of the matrix products of a step, counted.
    pub flops: u64,
    /// Bytes, counted.
    pub memory: Memory,
    /// Bytes that the process may take, those it has among them; none where the system does not tell, or the run is not
    /// on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// What the text anchor adds to a step, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor: Option<String>,
    /// What `distill.cache` will hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_cache: Option<TeacherCacheSize>,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Memory {
    /// The program with its libraries and the data workers, as it was when the counting began, and what the first steps
    /// touch of both; nothing of it on a GPU.
    pub program: u64,
    /// Weights of the model that are not trained, in the dtype that they are computed with, or in few bits; on the CPU views
    /// of their files, shared with other processes, where those are of that dtype.
    pub weights: u64,
    /// A block's frozen weights, brought together from several processes while it computes (`zero_stage: 3`), and as much again,
    /// in which Gloo brings them.
    pub gathered: u64,
    /// Where several processes train: the weights that one has changed, side by side as it sends them, and what the C library
    /// keeps of memory that was freed: of buckets of gradients, which are made anew after the first pass, up to twice one.
    pub exchanged: u64,
    /// The teacher's.
    pub teacher: u64,
    /// What is trained, in f32.
    pub masters: u64,
    /// Its gradients.
    pub gradients: u64,
    /// AdamW's two running means.
    pub optimizer: u64,
    /// The average of `ema_decay`.
    pub average: u64,
    /// What the frozen LLM makes of the text anchor's texts.
    pub anchor: u64,
    /// What the forward pass keeps for the backward pass, and what a layer's backward makes.
    pub activations: u64,
    /// Logits with their gradient.
    pub logits: u64,
}

/// Bytes of libtorch and of this program, mapped from their files, that the first steps touch: what the pages of one debug run on x86-64
/// came to.
const KERNELS: u64 = 48 << 20;

/// What a cache of the teacher's features comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TeacherCacheSize {
    /// Bytes of a picture like those of the first batch.
    pub bytes_per_picture: u64,
    /// Bytes when all data was seen, taking the first batch for all.
    pub total: Option<u64>,
}

impl Size {
    /// Counts what a run of this student takes; `program` is what the process held before the student was opened.
    pub(crate) fn count(
        config: &TrainConfig,
        student: &Student,
        training: &Arc<dyn Source>,
        program: u64,
    ) -> Result<Self> {
        let held = memory(student.device()).unwrap_or(0);
        let first = LoaderConfig {
            batch_size: config.per_device_train_batch_size,
            row_len: config.packed_row_len(),
            shares_starts: student.shares_starts(),
            shuffle: config.shuffle,
            seed: config.seed,
            group_by_modality: config.data.train.group_by_modality,
            ..LoaderConfig::default()
        };
        let batch = Loader::new(training.clone(), first)?.next().context("the data has no batch")??;
        let pictures = batch.images.len() as u64;
        let image_tokens = batch.spans.image_positions().len() as u64;
        let samples_in_batch = batch.samples.len() as u64;
        let kind = student.model.llm().kind();
        let cached_bytes = student
            .distill
            .as_ref()
            .zip(batch.images.first())
            .and_then(|(distill, picture)| distill.cached_bytes(picture.height as i64, picture.width as i64, kind));
        let words = batch.supervised().targets.len() as u64;
        let batch = BatchShape {
            samples: samples_in_batch,
            rows: batch.batch as u64,
            seq: batch.seq as u64,
            targets: if student.writes_pictures() { words + image_tokens } else { words },
            pictures,
            image_tokens,
        };
        let parameters = Parameters::of(student)?;
        let max_steps = max_steps(config, training.as_ref(), 1)?;
        let texts = config.text_anchor.as_ref().map_or(0, |anchor| anchor.num_texts(max_steps) as u64);
        let memory = Memory::count(config, student, &parameters, &batch, texts, program);
        let teacher_cache = cached_bytes.map(|bytes_per_picture| TeacherCacheSize {
            bytes_per_picture,
            total: training.len().map(|samples| samples * pictures * bytes_per_picture / samples_in_batch.max(1)),
        });
        let available = available_memory(student.device()).map(|more| more + held);
        let anchor = config.text_anchor.as_ref().map(|anchor| {
            let (taken, every) = (anchor.texts_a_step(), anchor.every);
            let often = if every == 1 { "a step".to_owned() } else { format!("every {every} steps") };
            format!("text_anchor: {taken} of {texts} texts of up to {} tokens {often}", anchor.max_length)
        });
        let (adapters, blocks) = (Adapted::of(&*student.model)?, Blocks::of(student.model.llm())?);
        let passes = config.gradient_accumulation_steps as u64;
        let flops = passes * work::flops(config, student, &parameters, &batch)?;
        Ok(Self { parameters, adapters, blocks, batch, passes, flops, memory, available, anchor, teacher_cache })
    }

    /// What each of `world_size` processes takes, of what one alone would: the most that one does, where whole tensors are dealt.
    pub(crate) fn of_each(&self, world_size: u64, zero_stage: u64) -> Memory {
        let mut memory = self.memory.clone();
        if world_size > 1 {
            memory.exchanged = 2 * memory.gradients.min(BUCKET_BYTES); // glibc's trim threshold, by the largest that was freed
        }
        if zero_stage > 0 {
            memory.exchanged +=
                if world_size > 1 { memory.masters.div_ceil(world_size).min(BROADCAST_BYTES) } else { 0 };
            let least = 8 * self.parameters.largest; // two means of one tensor, in f32
            memory.optimizer = memory.optimizer.div_ceil(world_size).max(least);
        }
        if zero_stage == 3 && world_size > 1 {
            let shared: u64 = self.blocks.iter().map(|blocks| blocks.count * blocks.frozen).sum();
            memory.weights = memory.weights - shared + shared.div_ceil(world_size);
            memory.gathered = 2 * self.blocks.iter().map(|blocks| blocks.frozen).max().unwrap_or(0);
        }
        memory
    }

    /// The bytes needed, where that is more than there is.
    pub fn exceeds(&self) -> Option<u64> {
        let needed = self.memory.total();
        self.available.filter(|available| needed > *available).map(|_| needed)
    }
}

/// Tells of a run that needs more memory than there is, before anything is made for it; it is one of `world_size` processes.
pub(crate) fn warn_if_short(
    config: &TrainConfig,
    student: &Student,
    training: &Arc<dyn Source>,
    program: u64,
    world_size: usize,
) {
    // Data that gives no batch is an error of the run itself.
    let Ok(mut size) = Size::count(config, student, training, program) else { return };
    size.memory = size.of_each(world_size as u64, config.zero_stage);
    if let (Some(needed), Some(available)) = (size.exceeds(), size.available) {
        let (needed, available) = (mebibytes(needed), mebibytes(available));
        tracing::warn!("this run takes about {needed} of memory, {available} are there: {SMALLER}");
    }
}

/// What to do where memory is short.
pub(crate) const SMALLER: &str = "take a smaller per_device_train_batch_size with more gradient_accumulation_steps, or \
     gradient_checkpointing: true";

/// Bytes in words.
pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.rows().iter().map(|(_, bytes)| bytes).sum()
    }

    pub(crate) fn rows(&self) -> [(&'static str, u64); 12] {
        [
            ("program", self.program),
            ("weights, frozen", self.weights),
            ("a block's, gathered", self.gathered),
            ("sent to others", self.exchanged),
            ("teacher", self.teacher),
            ("masters, f32", self.masters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("average of weights", self.average),
            ("text anchor", self.anchor),
            ("activations", self.activations),
            ("logits", self.logits),
        ]
    }
}

impl Memory {
    fn count(
        config: &TrainConfig,
        student: &Student,
        parameters: &Parameters,
        batch: &BatchShape,
        texts: u64,
        program: u64,
    ) -> Self {
        let llm = student.model.llm();
        let element = llm.kind().elt_size_in_bytes() as u64;
        let trained = parameters.num_trained();
        let masters = 4 * trained;
        let logits_rows = if llm.trains_head() { u64::MAX } else { logits_rows(llm) as u64 };
        // In the model's kind, elsewhere than on a CPU in f32 too, and the gradients of both.
        let width = if llm.device() == Device::Cpu { element } else { element + 4 };
        let wide = |rows: u64| rows.min(logits_rows) * llm.config().vocab_size as u64 * width;
        let logits = 2 * wide(batch.targets);
        let step = activations(config, student, parameters, batch);
        // The anchor's pass follows when nothing of the batch's is left; its logits are there for both models.
        let anchored = config.text_anchor.as_ref().map(|anchor| {
            let (rows, seq) = (anchor.texts_a_step() as u64, anchor.max_length as u64);
            let batch = BatchShape { samples: rows, rows, seq, targets: rows * seq, pictures: 0, image_tokens: 0 };
            let states = texts * seq * llm.config().hidden_size as u64 * element;
            (activations(config, student, parameters, &batch), 3 * wide(batch.targets), states)
        });
        let (anchor_step, anchor_logits, anchor) = anchored.unwrap_or_default();
        Self {
            program: program + if llm.device() == Device::Cpu { KERNELS } else { 0 },
            weights: element * (parameters.frozen - parameters.quantized)
                + in_few_bits(llm, QuantizedWeight::num_bytes).sum::<u64>(),
            gathered: 0,
            exchanged: 0,
            teacher: element * parameters.teacher,
            masters,
            gradients: masters,
            optimizer: 2 * masters,
            average: config.ema_decay.map_or(0, |_| masters),
            anchor,
            activations: step.max(anchor_step),
            logits: logits.max(anchor_logits),
        }
    }
}

/// Bytes that a forward pass keeps for its backward pass, and what the backward of one layer makes beside them.
fn activations(config: &TrainConfig, student: &Student, parameters: &Parameters, batch: &BatchShape) -> u64 {
    let llm = student.model.llm();
    let (c, element) = (llm.config(), llm.kind().elt_size_in_bytes() as u64);
    let (hidden, layers) = (c.hidden_size as u64, c.num_hidden_layers as u64);
    let tokens = batch.rows * batch.seq;
    let sizes = || (0..c.num_hidden_layers).map(|layer_idx| c.layer(layer_idx));
    let intermediate = sizes().map(|layer| layer.intermediate_size as u64).max().unwrap_or(0);
    // Into each norm and out of it; q, k, v, what attention gives and its rows for o_proj; gate, up and their product.
    let numbers = |layer: LayerSizes| {
        let (heads, kv) = (c.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim);
        4 * hidden + (3 * heads + 2 * kv + 3 * layer.intermediate_size) as u64
    };
    let all_layers = tokens * element * sizes().map(numbers).sum::<u64>();
    let state = tokens * element * hidden;
    let mut rank = 0; // columns of all adapters' inner products
    let visited = llm.linears(&mut |_, linear| {
        rank += linear.adapters().map(|adapter| adapter.r() as u64).sum::<u64>();
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the visit returns no error");
    // Trained weights are rounded to the kind of activations once a forward.
    let rounded = if llm.kind() == Kind::Float { 0 } else { element * parameters.num_trained() };
    let mut kept = all_layers + tokens * element * rank + rounded;
    if config.gradient_checkpointing {
        kept = (layers + 1) * state + kept / layers;
    }
    // What a layer's backward holds at once: gradients of its widest tensors.
    let mut backward = tokens * element * (3 * intermediate + 2 * hidden);
    // And a weight in few bits made whole, on a GPU by way of f32 and indices.
    let width = if llm.device() == Device::Cpu { element } else { element + 10 };
    backward += in_few_bits(llm, |weight| weight.size().iter().product::<i64>() as u64 * width).max().unwrap_or(0);
    let heads = student.distill.as_ref().map_or(0, |distill| {
        // In f32, a block: the student's rows before and behind the norm, and four times the teacher's width.
        let teacher = distill.teacher().hidden_size() as u64;
        distill.num_heads() as u64 * batch.image_tokens * 4 * (2 * hidden + 5 * teacher)
    });
    kept + backward + heads + tower_activations(&*student.model, batch)
}

/// Bytes that the encoder's forward pass keeps for its backward pass, where something in it is trained: what goes into and
/// out of each norm, and what comes out of each linear layer and of the first half of its adapters.
fn tower_activations(model: &dyn VisionLanguageModel, batch: &BatchShape) -> u64 {
    let Some(tower) = model.encoder() else { return 0 };
    if model.vision_lora().is_none() && tower.trained().is_empty() {
        return 0;
    }
    let mut width = 4 * tower.hidden_size() * tower.num_hidden_layers() as i64;
    let visited = tower.model().linears(&mut |_, linear| {
        width += linear.out_features() + linear.adapters().map(|adapter| adapter.r()).sum::<i64>();
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the visit returns no error");
    batch.image_tokens * width as u64 * tower.model().kind().elt_size_in_bytes() as u64
}
