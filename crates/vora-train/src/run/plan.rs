//! What a run will take, said before it begins: what [`Size`] counts of it, and the time that a few steps take, which
//! nothing is kept of and which also tell what the counting left out.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use tch::Device;
use vora_data::SampleMaker;
use vora_recipe::TrainConfig;
use vora_torch::runtime::{memory, peak_memory, threads};

use crate::data;
use crate::run::batch_shape::BatchShape;
use crate::run::blocks::Blocks;
use crate::run::dtype;
use crate::run::parameters::Adapted;
use crate::run::scale::Scale;
use crate::run::size::{SMALLER, Size, mebibytes};
use crate::run::table::{right, table};
use crate::run::trainer::{Options, Trainer};
use vora_student::Student;

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
#[non_exhaustive]
pub struct Plan {
    /// What was counted.
    #[serde(flatten)]
    pub size: Size,
    /// Threads that compute on the CPU, and those that make samples.
    pub threads: Threads,
    /// What steps of the run took; none where they would not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// What more processes send each other, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
}

/// How a run's threads share the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Threads {
    /// Those of libtorch's operators.
    pub compute: usize,
    /// `dataloader_num_workers`.
    pub make_samples: usize,
}

/// Steps that were made to see what they take.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Measured {
    /// How many.
    pub steps: u32,
    /// Seconds a step, the mean.
    pub seconds_per_step: f64,
    /// The most memory that was held, in bytes: by the process on the CPU, by its tensors on a GPU; none where the system
    /// does not tell.
    pub peak_memory: Option<u64>,
}

impl Plan {
    /// Opens the model, counts, and unless it has no weights yet or would not fit into the memory that there is makes a few
    /// steps in a folder that is gone afterwards.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Trainer::train_step`], the run folder left out: nothing is read from it or written to.
    pub fn measure(config: &TrainConfig, options: Options<'_>) -> Result<Self> {
        let (size, is_outline) = Self::open(config, &options)?;
        let threads = Threads { compute: threads(), make_samples: config.dataloader_num_workers };
        if is_outline || size.exceeds().is_some() {
            return Ok(Self { size, threads, measured: None, scale: None });
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
        let measured = Measured { steps, seconds_per_step, peak_memory: peak_memory(device) };
        Ok(Self { size, threads, measured: Some(measured), scale: None })
    }

    /// With what 2, 4, 8, .. up to `world_size` processes send each other.
    #[must_use]
    pub fn with_processes(self, world_size: u64) -> Self {
        let seconds = self.measured.as_ref().map(|measured| measured.seconds_per_step);
        let peak_memory = self.measured.as_ref().and_then(|measured| measured.peak_memory);
        Self { scale: Some(Scale::new(&self.size, world_size.max(2), seconds, peak_memory)), ..self }
    }

    /// Opens the model, counts, and closes it; says whether it had shapes alone.
    fn open(config: &TrainConfig, options: &Options<'_>) -> Result<(Size, bool)> {
        let program = memory(options.device).unwrap_or(0);
        let student = Student::outline(config, options.device, dtype::kind(config, options.device)?, options.resolve)?;
        let maker = Arc::new(SampleMaker::new(student.preparation(config)?));
        let size = Size::count(config, &student, &data::training(config, &maker)?, program)?;
        Ok((size, student.is_outline()))
    }
}

impl fmt::Display for Plan {
    /// Tables of parameters and memory, and a line of what was measured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = &self.size;
        let mut parameters = table(&["parameters", ""]);
        parameters.add_row(["frozen".to_owned(), millions(size.parameters.frozen)]);
        if size.parameters.quantized > 0 {
            parameters.add_row(["of them in few bits".to_owned(), millions(size.parameters.quantized)]);
        }
        if size.parameters.teacher > 0 {
            parameters.add_row(["teacher, frozen".to_owned(), millions(size.parameters.teacher)]);
        }
        for (part, count) in &size.parameters.trained {
            parameters.add_row([format!("trained: {part}"), millions(*count)]);
        }
        writeln!(f, "{}", right(parameters))?;
        if !size.adapters.is_empty() {
            let mut adapters = table(&["adapters", "linears", "r", "parameters"]);
            for Adapted { part, module, r, linears, parameters } in &size.adapters {
                let name = format!("{part}: {module}");
                adapters.add_row([name, linears.to_string(), r.to_string(), millions(*parameters)]);
            }
            writeln!(f, "{}", right(adapters))?;
        }
        if self.scale.is_some() {
            let mut blocks = table(&["blocks", "alike", "gradient of adapters", "frozen weights"]);
            let mut first = 0;
            for Blocks { count, frozen, adapters } in &size.blocks {
                let name = format!("{first} to {}", first + count - 1);
                blocks.add_row([name, count.to_string(), mebibytes(*adapters), mebibytes(*frozen)]);
                first += count;
            }
            writeln!(f, "{}", right(blocks))?;
        }
        let mut memory = table(&["memory", "counted"]);
        for (what, bytes) in size.memory.rows() {
            memory.add_row([what.to_owned(), mebibytes(bytes)]);
        }
        memory.add_row(["all".to_owned(), mebibytes(size.memory.total())]);
        writeln!(f, "{}", right(memory))?;
        let BatchShape { samples, rows, seq, pictures, image_tokens, targets } = &size.batch;
        let row = if *rows == 1 { "row" } else { "rows" };
        writeln!(
            f,
            "a batch: {samples} samples in {rows} {row} of up to {seq} tokens, {pictures} pictures of {image_tokens} tokens in all, {targets} targets"
        )?;
        if let Some(cache) = &size.teacher_cache {
            let all = cache.total.map_or(String::new(), |total| format!(", {} for all data", mebibytes(total)));
            writeln!(f, "distill.cache: {} a picture{all}", mebibytes(cache.bytes_per_picture))?;
        }
        if let Some(anchor) = &size.anchor {
            writeln!(f, "{anchor}")?;
        }
        let Threads { compute, make_samples } = self.threads;
        writeln!(f, "threads: {compute} compute on the CPU, {make_samples} make samples")?;
        match &self.measured {
            Some(measured) => {
                let peak = measured.peak_memory.map_or(String::new(), |peak| format!(", {} at most", mebibytes(peak)));
                write!(f, "measured on {} steps: {:.3} s a step{peak}", measured.steps, measured.seconds_per_step)
            }
            None => match (size.exceeds(), size.available) {
                (Some(needed), Some(available)) => {
                    let (needed, available) = (mebibytes(needed), mebibytes(available));
                    write!(f, "not measured: {needed} are needed, {available} are there; {SMALLER}")
                }
                _ => write!(f, "not measured: the folder of model.llm, or of the encoder, has no weights"),
            },
        }?;
        match &self.scale {
            Some(scale) => write!(f, "\n{scale}"),
            None => Ok(()),
        }
    }
}

fn millions(count: u64) -> String {
    format!("{:.2}M", count as f64 / 1e6)
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
        let options = Options::new(Device::Cpu, &resolve);
        let plan = Plan::measure(&config, options).unwrap();
        assert!(!run.exists(), "a plan writes no run folder");
        plan
    }

    #[test]
    fn a_plan_counts_what_a_run_holds() {
        let plan = measure(&["bf16=false"]);
        let parts: Vec<&str> = plan.size.parameters.trained.keys().map(String::as_str).collect();
        assert_eq!(parts, ["adapters", "aux_vision", "vision_embedding"]);
        let bytes = |file: &str| std::fs::metadata(fixtures::root().join("tiny").join(file)).unwrap().len() as f64;
        // The files hold tensors and a short header; the teacher's are in f32.
        let share = 4.0 * plan.size.parameters.teacher as f64 / bytes("dinov2/model.safetensors");
        assert!((0.8..=1.0).contains(&share), "{share}");
        let memory = &plan.size.memory;
        assert_eq!(memory.masters, 4 * plan.size.parameters.num_trained());
        assert_eq!((memory.gradients, memory.optimizer), (memory.masters, 2 * memory.masters));
        assert_eq!((plan.size.batch.rows, plan.size.batch.pictures, plan.size.batch.image_tokens), (1, 2, 32));
        let measured = plan.measured.as_ref().unwrap();
        assert!(measured.seconds_per_step > 0.0 && plan.size.exceeds().is_none());
        let text = plan.to_string();
        for part in ["trained: adapters", "optimizer", "in 1 row of", "compute on the CPU, 1 make samples", "s a step"]
        {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn more_processes_send_what_their_strategy_needs() {
        let plan = measure(&[]).with_processes(24);
        let scale = plan.scale.as_ref().unwrap();
        let found: Vec<_> = scale.rows.iter().map(|row| (row.world_size, row.zero_stage)).collect();
        assert_eq!(found, [2, 4, 8, 16, 24].map(|n| [(n, 0), (n, 1), (n, 3)]).concat());
        let (bytes, row) = (plan.size.memory.gradients, &scale.rows[5]); // four processes that share all
        let optimizer = (bytes / 2).max(8 * plan.size.parameters.largest);
        assert_eq!((row.gradients, row.weights, row.optimizer), (bytes * 3 / 2, bytes * 3 / 4, optimizer));
        // Four blocks, two with adapters; queries and outputs of 32 x 32, keys and values of 16 x 32, an MLP of 64.
        let [Blocks { count: 2, frozen, adapters }, Blocks { count: 2, adapters: 0, .. }] = plan.size.blocks[..] else {
            panic!("{:?}", plan.size.blocks)
        };
        assert_eq!(frozen, 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64));
        assert_eq!(row.gathered, plan.size.passes * 2 * 4 * frozen * 3 / 4);
        assert!(adapters > 0 && 2 * adapters < bytes);
        let all = plan.measured.as_ref().unwrap().peak_memory.unwrap();
        let exchanged = 2 * bytes + bytes / 4; // gradients, less than a bucket, and the masters of one process
        assert_eq!(row.memory, all - (2 * bytes - optimizer) - 3 * frozen + 2 * frozen + exchanged);
        assert!(scale.rows.iter().all(|row| row.bandwidth > 0.0 && (row.weights == 0) == (row.zero_stage == 0)));
        assert!(scale.tera_flops.is_none() && plan.to_string().contains("gradients sent a step"), "{plan}");
    }

    #[test]
    fn adapters_are_listed_by_the_part_that_they_are_in() {
        let llava = "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
                     lora: {layers: 1, r: 4, target_modules: [q_proj]}, vision_lora: {r: 2, target_modules: [query, fc1]}}";
        let plan = measure(&[llava, "distill={}"]);
        let found: Vec<(&str, &str, i64)> =
            plan.size.adapters.iter().map(|a| (a.part.as_str(), a.module.as_str(), a.r)).collect();
        let query = ("vision_tower", "attention.attention.query", 2);
        assert_eq!(found, [("language_model", "self_attn.q_proj", 4), query, ("vision_tower", "mlp.fc1", 2)]);
        let blocks = plan.size.adapters[1].linears;
        assert_eq!(plan.size.adapters[1].parameters, blocks * 2 * 2 * 24); // r, A and B, channels of the tiny encoder
        let trained = plan.size.parameters.trained["adapters"];
        assert_eq!(plan.size.adapters.iter().map(|adapted| adapted.parameters).sum::<u64>(), trained);
        let text = plan.to_string();
        assert!(text.contains("vision_tower: attention.attention.query"), "{text}");
        let frozen =
            measure(&[&llava.replace(", vision_lora: {r: 2, target_modules: [query, fc1]}", ""), "distill={}"]);
        assert!(plan.size.memory.activations > frozen.size.memory.activations);
        assert_eq!(plan.size.parameters.frozen, frozen.size.parameters.frozen);
        let whole = measure(&[
            &llava.replace("vision_lora: {r: 2, target_modules: [query, fc1]}", "train: [vision_tower]"),
            "distill={}",
        ]);
        let tower = whole.size.parameters.trained["vision_tower"];
        assert_eq!(whole.size.parameters.frozen + tower, frozen.size.parameters.frozen);
    }

    #[test]
    fn weights_in_few_bits_are_counted_as_they_are_kept() {
        let [plain, four, eight] = ["model.chat_template=null", "model.load_in_4bit=true", "model.load_in_8bit=true"]
            .map(|key| measure(&[key]));
        for kept in [&four, &eight] {
            assert_eq!(kept.size.parameters.frozen, plain.size.parameters.frozen);
            assert!(kept.to_string().contains("of them in few bits"), "{kept}");
        }
        let elements = four.size.parameters.quantized;
        assert!(elements > 0 && elements == eight.size.parameters.quantized && plain.size.parameters.quantized == 0);
        let saved = |kept: &Plan| (plain.size.memory.weights - kept.size.memory.weights) as f64 / elements as f64;
        // Of four bytes; the tables of a weight are large beside those of the tiny LLM.
        assert!(
            (1.0..3.5).contains(&saved(&four)) && (2.8..3.0).contains(&saved(&eight)),
            "{} {}",
            saved(&four),
            saved(&eight)
        );
        assert!(four.size.memory.activations > plain.size.memory.activations);
    }

    #[test]
    fn layers_computed_anew_are_counted_once() {
        let [kept, recomputed] =
            ["gradient_checkpointing=false", "gradient_checkpointing=true"].map(|key| measure(&[key]).size.memory);
        assert!(recomputed.activations < kept.activations && recomputed.masters == kept.masters);
    }

    #[test]
    fn a_text_anchor_is_counted() {
        let size = |keys: &[&str]| measure(&[&["bf16=false"], keys].concat());
        let few = size(&["text_anchor={texts: 6, tokens: 24, max_length: 12, every: 3}"]);
        let hidden = 32; // of the tiny LLM
        assert_eq!(few.size.memory.anchor, 6 * 12 * hidden * 4);
        assert!(few.to_string().contains("text_anchor: 2 of 6 texts of up to 12 tokens every 3 steps"), "{few}");
        let none = size(&[]);
        assert_eq!(none.size.memory.anchor, 0);
        // More text than the batch has tokens makes the larger pass.
        let many = size(&["text_anchor={texts: 9, tokens: 480, max_length: 240}"]);
        assert!(many.size.memory.activations > none.size.memory.activations);
        assert!(many.size.memory.logits > few.size.memory.logits);
    }

    #[test]
    fn what_does_not_fit_is_not_tried() {
        let mut plan = measure(&[]);
        plan.measured = None;
        plan.size.available = Some(plan.size.memory.total() - 1);
        assert_eq!(plan.size.exceeds(), Some(plan.size.memory.total()));
        assert!(plan.to_string().contains("gradient_checkpointing: true"), "{plan}");
        plan.size.available = Some(plan.size.memory.total());
        assert_eq!(plan.size.exceeds(), None);
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
        let size = plan.size.teacher_cache.unwrap();
        let tokens = plan.size.batch.image_tokens / plan.size.batch.pictures;
        assert_eq!(size.bytes_per_picture, 2 * tokens * 24 * 4); // blocks with heads, channels, bytes
        assert!(size.total.is_some_and(|total| total >= size.bytes_per_picture));
        assert!(cache.exists());
    }
}
