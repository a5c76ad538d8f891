//! What a run will take, said before it begins: parameters, memory and time a step.
//!
//! Parameters and what stays from step to step are counted from the model itself, once it is opened and before anything
//! is made for training; activations follow from the shapes of its first batch. [`Plan::measure`] then makes a few
//! steps, which nothing is kept of: they tell the time, and what the counting left out.

mod available;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use tch::{Device, Kind};
use vora_data::{Loader, LoaderConfig, SampleMaker, Source};

use crate::config::run::TrainConfig;
use crate::data;
use crate::run::trainer::{Options, Trainer};
use crate::student::{MAX_LOGITS, Student};
use vora_torch::memory::{memory, peak_memory};

/// What is not counted before steps are measured: libtorch makes its kernels ready, and on a GPU its allocator asks the
/// driver for memory as long as batches come in new shapes. On an H200 steps 2 to 14 of a run took 0.26 s, later ones 0.14.
const WARM_UP: Phase = Phase { at_least: 1, at_most: 20, for_seconds: 3.0 };
/// What is measured.
const MEASURED: Phase = Phase { at_least: 4, at_most: 20, for_seconds: 3.0 };

/// Some steps in a row.
#[derive(Debug, Clone, Copy)]
struct Phase {
    at_least: u32,
    at_most: u32,
    for_seconds: f64,
}

impl Phase {
    /// Makes steps for as long, and tells how many and the seconds that they took in all.
    fn run(self, trainer: &mut Trainer, device: Device) -> Result<(u32, f64)> {
        vora_torch::runtime::synchronize(device);
        let start = Instant::now();
        let mut steps = 0;
        loop {
            trainer.train_step()?;
            vora_torch::runtime::synchronize(device);
            steps += 1;
            let seconds = start.elapsed().as_secs_f64();
            if steps >= self.at_most || (steps >= self.at_least && seconds >= self.for_seconds) {
                return Ok((steps, seconds));
            }
        }
    }
}

/// What a run takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Elements of what is trained and what is not.
    pub parameters: Parameters,
    /// The first batch: all others are taken to be like it.
    pub batch: BatchShape,
    /// Bytes, counted.
    pub memory: Memory,
    /// What steps of the run took; none before [`Plan::measure`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Bytes that the process may take, those it has among them; none where the system does not tell, or the run is not
    /// on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// What `distill.cache` will hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_cache: Option<TeacherCacheSize>,
}

/// Elements of tensors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Parameters {
    /// Of the model, as it was and stays.
    pub frozen: u64,
    /// Of the teacher.
    pub teacher: u64,
    /// Trained ones by part of the model.
    pub trained: BTreeMap<String, u64>,
}

/// One forward pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BatchShape {
    /// Rows.
    pub rows: u64,
    /// Tokens of the longest row.
    pub seq: u64,
    /// Places that the language loss is summed over.
    pub targets: u64,
    /// Pictures.
    pub pictures: u64,
    /// Tokens that they become.
    pub image_tokens: u64,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// The program with its libraries and the data workers, as it was when the counting began; nothing of it on a GPU.
    pub program: u64,
    /// Weights of the model that are not trained, in the kind that they are computed with; on the CPU views of their
    /// files, shared with other processes, where those are of that kind.
    pub weights: u64,
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
    /// What the forward pass keeps for the backward pass, and what a layer's backward makes.
    pub activations: u64,
    /// Logits with their gradient.
    pub logits: u64,
}

/// Steps that were made to see what they take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// How many.
    pub steps: u32,
    /// Seconds a step, the mean.
    pub seconds_per_step: f64,
    /// The most memory that was held, in bytes: by the process on the CPU, by its tensors on a GPU; none where the system
    /// does not tell.
    pub peak_memory: Option<u64>,
}

/// What a cache of the teacher's features comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TeacherCacheSize {
    /// Bytes of a picture like those of the first batch.
    pub bytes_per_picture: u64,
    /// Bytes when all data was seen, taking the first batch for all.
    pub total: Option<u64>,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.rows().iter().map(|(_, bytes)| bytes).sum()
    }

    fn rows(&self) -> [(&'static str, u64); 9] {
        [
            ("program", self.program),
            ("weights, frozen", self.weights),
            ("teacher", self.teacher),
            ("masters, f32", self.masters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("average of weights", self.average),
            ("activations", self.activations),
            ("logits", self.logits),
        ]
    }
}

impl Plan {
    /// Opens the model, counts, and unless it would not fit into the memory that there is makes a few steps in a folder
    /// that is gone afterwards.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Trainer::train_step`], the run folder left out: nothing is read from it or written to.
    pub fn measure(config: &TrainConfig, options: Options<'_>) -> Result<Self> {
        let mut plan = Self::open(config, &options)?;
        if plan.exceeds().is_some() {
            return Ok(plan);
        }
        let folder = tempfile::tempdir().context("cannot make a temporary folder to measure in")?;
        let mut config = config.clone();
        config.output_dir = folder.path().join("run");
        config.max_steps = i64::from(WARM_UP.at_most + MEASURED.at_most);
        let device = options.device;
        let mut trainer = Trainer::new(config, Options { resume: false, ..options })?;
        WARM_UP.run(&mut trainer, device)?;
        let (steps, seconds) = MEASURED.run(&mut trainer, device)?;
        let seconds_per_step = seconds / f64::from(steps);
        plan.measured = Some(Measured { steps, seconds_per_step, peak_memory: peak_memory(device) });
        Ok(plan)
    }

    /// Opens the model, counts, and closes it.
    fn open(config: &TrainConfig, options: &Options<'_>) -> Result<Self> {
        let program = memory(options.device).unwrap_or(0);
        let student = Student::new(config, options.device, config.kind(options.device)?, options.resolve)?;
        let maker = Arc::new(SampleMaker::new(student.preparation().clone()));
        Self::count(config, &student, &data::training(config, &maker)?, program)
    }

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
            rows: batch.batch as u64,
            seq: batch.seq as u64,
            targets: if student.writes_pictures() { words + image_tokens } else { words },
            pictures,
            image_tokens,
        };
        let parameters = Parameters::of(student)?;
        let memory = Memory::count(config, student, &parameters, &batch, program);
        let teacher_cache = cached_bytes.map(|bytes_per_picture| TeacherCacheSize {
            bytes_per_picture,
            total: training.len().map(|samples| samples * pictures * bytes_per_picture / samples_in_batch.max(1)),
        });
        let available = available::available(student.device()).map(|more| more + held);
        Ok(Self { parameters, batch, memory, measured: None, available, teacher_cache })
    }

    /// The largest size that is known, where more is needed than there is.
    pub fn exceeds(&self) -> Option<u64> {
        let needed = self.peak();
        self.available.filter(|available| needed > *available).map(|_| needed)
    }

    /// The most memory at once in bytes: measured where it was, else counted.
    pub fn peak(&self) -> u64 {
        self.measured.as_ref().and_then(|measured| measured.peak_memory).unwrap_or_else(|| self.memory.total())
    }
}

/// Tells of a run that needs more memory than there is, before anything is made for it.
pub(crate) fn warn_if_short(config: &TrainConfig, student: &Student, training: &Arc<dyn Source>, program: u64) {
    // Data that gives no batch is an error of the run itself.
    let Ok(plan) = Plan::count(config, student, training, program) else { return };
    if let (Some(needed), Some(available)) = (plan.exceeds(), plan.available) {
        let (needed, available) = (mebibytes(needed), mebibytes(available));
        tracing::warn!("this run takes about {needed} of memory, {available} are there: {SMALLER}");
    }
}

impl Parameters {
    fn of(student: &Student) -> Result<Self> {
        let mut trained = BTreeMap::new();
        for (name, tensor) in student.parameters() {
            let part = if name.contains(".lora_") { "adapters" } else { name.split('.').next().unwrap_or(&name) };
            *trained.entry(part.to_owned()).or_default() += tensor.numel() as u64;
        }
        let llm = student.model.llm().tensors();
        let mut frozen: u64 =
            llm.iter().filter(|(_, tensor)| !tensor.requires_grad()).map(|(_, tensor)| tensor.numel() as u64).sum();
        frozen += student.made().iter().map(|(_, tensor)| tensor.numel() as u64).sum::<u64>();
        frozen += student.model.encoder_tensors().iter().map(|(_, tensor)| tensor.numel() as u64).sum::<u64>();
        let teacher = student
            .distill
            .as_ref()
            .map_or(0, |distill| distill.teacher().tensors().iter().map(|(_, tensor)| tensor.numel() as u64).sum());
        Ok(Self { frozen, teacher, trained })
    }

    fn num_trained(&self) -> u64 {
        self.trained.values().sum()
    }
}

impl Memory {
    fn count(
        config: &TrainConfig,
        student: &Student,
        parameters: &Parameters,
        batch: &BatchShape,
        program: u64,
    ) -> Self {
        let llm = student.model.llm();
        let element = llm.kind().elt_size_in_bytes() as u64;
        let trained = parameters.num_trained();
        let masters = 4 * trained;
        let logits_rows = if llm.trains_head() { u64::MAX } else { MAX_LOGITS as u64 / llm.config().vocab_size as u64 };
        // In the model's kind, in f32, and the gradients of both.
        let logits = batch.targets.min(logits_rows) * llm.config().vocab_size as u64 * 2 * (element + 4);
        Self {
            program,
            weights: element * parameters.frozen,
            teacher: element * parameters.teacher,
            masters,
            gradients: masters,
            optimizer: 2 * masters,
            average: config.ema_decay.map_or(0, |_| masters),
            activations: activations(config, student, parameters, batch),
            logits,
        }
    }
}

/// Bytes that a forward pass keeps for its backward pass, and what the backward of one layer makes beside them.
fn activations(config: &TrainConfig, student: &Student, parameters: &Parameters, batch: &BatchShape) -> u64 {
    let llm = student.model.llm();
    let (c, element) = (llm.config(), llm.kind().elt_size_in_bytes() as u64);
    let (hidden, intermediate, layers) = (c.hidden_size as u64, c.intermediate_size as u64, c.num_hidden_layers as u64);
    let heads = (c.num_attention_heads * c.head_width()) as u64;
    let kv = (c.kv_heads() * c.head_width()) as u64;
    let tokens = batch.rows * batch.seq;
    // Into each norm and out of it; q, k, v, what attention gives and its rows for o_proj; gate, up and their product.
    let layer = tokens * element * (4 * hidden + 3 * heads + 2 * kv + 3 * intermediate);
    let state = tokens * element * hidden;
    let mut rank = 0; // columns of all adapters' inner products
    let visited = llm.linears(&mut |_, _, linear| {
        rank += linear.adapters().map(|adapter| adapter.r() as u64).sum::<u64>();
        Ok(())
    });
    debug_assert!(visited.is_ok(), "the visit returns no error");
    // Trained weights are rounded to the kind of activations once a forward.
    let rounded = if llm.kind() == Kind::Float { 0 } else { element * parameters.num_trained() };
    let mut kept = layers * layer + tokens * element * rank + rounded;
    if config.gradient_checkpointing {
        kept = (layers + 1) * state + kept / layers;
    }
    // What a layer's backward holds at once: gradients of its widest tensors.
    let backward = tokens * element * (3 * intermediate + 2 * hidden);
    let heads = student.distill.as_ref().map_or(0, |distill| {
        // In f32, a block: the student's rows before and behind the norm, and four times the teacher's width.
        let teacher = distill.teacher().hidden_size() as u64;
        distill.num_heads() as u64 * batch.image_tokens * 4 * (2 * hidden + 5 * teacher)
    });
    kept + backward + heads
}

impl fmt::Display for Plan {
    /// Tables of parameters and memory, and a line of what was measured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parameters = table(["parameters", ""]);
        parameters.add_row(["frozen".to_owned(), millions(self.parameters.frozen)]);
        if self.parameters.teacher > 0 {
            parameters.add_row(["teacher, frozen".to_owned(), millions(self.parameters.teacher)]);
        }
        for (part, count) in &self.parameters.trained {
            parameters.add_row([format!("trained: {part}"), millions(*count)]);
        }
        writeln!(f, "{}", right(parameters))?;
        let mut memory = table(["memory", "counted"]);
        for (what, bytes) in self.memory.rows() {
            memory.add_row([what.to_owned(), mebibytes(bytes)]);
        }
        memory.add_row(["all".to_owned(), mebibytes(self.memory.total())]);
        writeln!(f, "{}", right(memory))?;
        let BatchShape { rows, seq, pictures, image_tokens, targets } = &self.batch;
        writeln!(
            f,
            "a batch: {rows} rows of up to {seq} tokens, {pictures} pictures of {image_tokens} tokens in all, {targets} targets"
        )?;
        if let Some(cache) = &self.teacher_cache {
            let all = cache.total.map_or(String::new(), |total| format!(", {} for all data", mebibytes(total)));
            writeln!(f, "distill.cache: {} a picture{all}", mebibytes(cache.bytes_per_picture))?;
        }
        match &self.measured {
            Some(measured) => {
                let peak = measured.peak_memory.map_or(String::new(), |peak| format!(", {} at most", mebibytes(peak)));
                write!(f, "measured on {} steps: {:.3} s a step{peak}", measured.steps, measured.seconds_per_step)
            }
            None => match (self.exceeds(), self.available) {
                (Some(needed), Some(available)) => {
                    let (needed, available) = (mebibytes(needed), mebibytes(available));
                    write!(f, "not measured: {needed} are needed, {available} are there; {SMALLER}")
                }
                _ => write!(f, "not measured"),
            },
        }
    }
}

/// What to do where memory is short.
const SMALLER: &str = "take a smaller per_device_train_batch_size with more gradient_accumulation_steps, or \
     gradient_checkpointing: true";

fn table(header: [&str; 2]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

fn right(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn millions(count: u64) -> String {
    format!("{:.2}M", count as f64 / 1e6)
}

/// Bytes in words.
fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn measure(overrides: &[&str]) -> Plan {
        let root = fixtures::root();
        let recipe = root.join("../crates/vora-train/recipes/smoke.yaml");
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        overrides.extend([format!("output_dir={}", run.display()), "bf16=false".to_owned()]);
        let config = TrainConfig::open(&recipe, &overrides).unwrap();
        let resolve = |name: &str| Ok::<PathBuf, anyhow::Error>(root.join("..").join(Path::new(name)));
        let options = Options {
            device: Device::Cpu,
            resume: false,
            resolve: &resolve,
            stop: Arc::default(),
            save: Arc::default(),
        };
        let plan = Plan::measure(&config, options).unwrap();
        assert!(!run.exists(), "a plan writes no run folder");
        plan
    }

    #[test]
    fn a_plan_counts_what_a_run_holds() {
        let plan = measure(&["bf16=false"]);
        let parts: Vec<&str> = plan.parameters.trained.keys().map(String::as_str).collect();
        assert_eq!(parts, ["adapters", "aux_vision", "vision_embedding"]);
        let bytes = |file: &str| std::fs::metadata(fixtures::root().join("tiny").join(file)).unwrap().len() as f64;
        // The files hold tensors and a short header; the teacher's are in f32.
        let share = 4.0 * plan.parameters.teacher as f64 / bytes("dinov2/model.safetensors");
        assert!((0.8..=1.0).contains(&share), "{share}");
        let memory = &plan.memory;
        assert_eq!(memory.masters, 4 * plan.parameters.num_trained());
        assert_eq!((memory.gradients, memory.optimizer), (memory.masters, 2 * memory.masters));
        assert_eq!((plan.batch.rows, plan.batch.pictures, plan.batch.image_tokens), (2, 2, 32));
        let measured = plan.measured.as_ref().unwrap();
        assert!(measured.seconds_per_step > 0.0 && plan.exceeds().is_none());
        let text = plan.to_string();
        for part in ["trained: adapters", "optimizer", "a batch: 2 rows", "s a step"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn layers_computed_anew_are_counted_once() {
        let [kept, recomputed] =
            ["gradient_checkpointing=false", "gradient_checkpointing=true"].map(|key| measure(&[key]).memory);
        assert!(recomputed.activations < kept.activations && recomputed.masters == kept.masters);
    }

    #[test]
    fn what_does_not_fit_is_not_tried() {
        let mut plan = measure(&[]);
        plan.measured = None;
        plan.available = Some(plan.memory.total() - 1);
        assert_eq!(plan.exceeds(), Some(plan.memory.total()));
        assert!(plan.to_string().contains("gradient_checkpointing: true"), "{plan}");
        plan.available = Some(plan.memory.total());
        assert_eq!(plan.exceeds(), None);
    }

    #[test]
    fn a_cache_has_its_size_foretold() {
        let folder = tempfile::tempdir().unwrap();
        let data = fixtures::root().join("tiny/data");
        let fetch = format!(
            "data.train={{data_fetch: {{data_paths: [{{anno_path: '{}', image_folder: '{}'}}]}}}}",
            data.join("conversations.jsonl").display(),
            data.join("images").display()
        );
        let cache = folder.path().join("cache");
        let cached = format!("distill.cache={}", cache.display());
        let plan = measure(&[&fetch, "data.eval={}", "bf16=false", "distill.mean_over=2", &cached]);
        let size = plan.teacher_cache.unwrap();
        let tokens = plan.batch.image_tokens / plan.batch.pictures;
        assert_eq!(size.bytes_per_picture, 2 * tokens * 24 * 4); // blocks with heads, channels, bytes
        assert!(size.total.is_some_and(|total| total >= size.bytes_per_picture));
        assert!(cache.exists());
    }
}
