//! The trainer: both losses, one backward pass, one AdamW step, and everything around them that makes a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use thiserror::Error;
use vora_data::{Batch, Loader, LoaderConfig, Source};
use vora_torch::runtime;
use vora_torch::safetensors::{Checkpoint, save, write_atomically};

use crate::checkpoint::{self, RunFolder, TrainerState};
use crate::config::{Strategy, TrainConfig};
use crate::data::{self, HeldOut};
use crate::distill::TeacherMean;
use crate::eval::{self, EvalReport};
use crate::metrics::{EvalMetrics, Line, MetricsLog, Progress, SpikeDetector, StepMetrics};
use crate::optim::Optimizer;
use crate::schedule::Schedule;
use crate::student::{DeviceBatch, Student};
use crate::{plot, samples, saved};

const CONFIG: &str = "config.yaml";
const OPTIMIZER: &str = "optimizer.safetensors";
const TEACHER_MEAN: &str = "teacher_mean.safetensors";
const RANDOM: &str = "scenes: ChaCha8 of (seed, split, index); order: Feistel network of SplitMix64; new weights: by seed and name";

/// Held-out pictures of each split that are written for asking.
const SAMPLES: u64 = 8;

/// What a run needs that its file does not say.
pub struct Options<'a> {
    /// Where to train.
    pub device: Device,
    /// Whether to go on from the run folder's last checkpoint, where there is one.
    pub resume: bool,
    /// Finds the folder of a model by the name in the run file.
    pub resolve: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// Set by a signal: the run then saves a checkpoint and stops.
    pub stop: Arc<AtomicBool>,
}

/// How a run came to its end.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps done, everything written.
    Finished(EvalReport),
    /// Asked to stop after this step; a checkpoint was written.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// A step that was refused before it touched a weight.
#[derive(Debug, Error, PartialEq)]
#[error(
    "step {step} is not finite (language loss {loss_lm}, distillation loss {loss_distill}, gradient norm {grad_norm}) \
     on {}; the weights are still those of step {}", samples.join(", "), step - 1
)]
pub struct NotFinite {
    /// The step, counted from 1.
    pub step: u64,
    /// Cross-entropy per token.
    pub loss_lm: f64,
    /// Cosine loss.
    pub loss_distill: f64,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// The samples whose hidden states are not finite; all of the step's where no single one is to blame.
    pub samples: Vec<String>,
}

/// One run.
pub struct Trainer {
    config: TrainConfig,
    run: RunFolder,
    student: Student,
    optimizer: Optimizer,
    schedule: Schedule,
    loader: Loader,
    held_out: Vec<HeldOut>,
    metrics: MetricsLog,
    spikes: SpikeDetector,
    step: u64,    // done so far
    resumed: u64, // done when this process began
    seconds: f64,
    stop: Arc<AtomicBool>,
}

impl Trainer {
    /// Opens everything: run folder, models, data; reads the last checkpoint where the run is resumed.
    ///
    /// # Errors
    /// Whatever does not fit, by name: a run folder in use or already full, a model that is missing, an adapter of
    /// another rank.
    pub fn new(config: TrainConfig, options: Options<'_>) -> Result<Self> {
        let run = RunFolder::lock(&config.output_dir)?;
        let last = last_checkpoint(&run, &config, options.resume)?;
        let state = last.as_deref().map(TrainerState::open).transpose()?;
        for (key, reason) in config.without_effect() {
            tracing::warn!("{key} has no effect here: {reason}");
        }

        let kind = runtime::kind(config.bf16.map_or("auto", |bf16| if bf16 { "bf16" } else { "f32" }), options.device)?;
        let mut student = Student::new(&config, options.device, kind, options.resolve)?;
        let maker = data::sample_maker(&config, student.llm_folder(), student.processor().clone())?;
        let training = data::training(&config, &maker)?;
        let held_out = data::held_out(&config, &maker)?;

        let mut optimizer = Optimizer::new(student.parameters(), config.optim())?;
        if let Some(folder) = &last {
            restore(&mut student, &mut optimizer, folder)
                .with_context(|| format!("cannot resume from {}", folder.display()))?;
        } else {
            measure_teacher(&mut student, &config, &training)?;
        }

        let (step, start) = state.as_ref().map_or((0, 0), |state| (state.step, state.samples_seen));
        let schedule = config.schedule(max_steps(&config, training.as_ref())?);
        let loader = Loader::new(
            training,
            LoaderConfig {
                batch_size: config.per_device_train_batch_size,
                num_workers: config.dataloader_num_workers,
                shuffle: config.shuffle,
                seed: config.seed,
                start,
                ..LoaderConfig::default()
            },
        )?;
        let metrics = MetricsLog::open(&run.path().join("metrics.jsonl"), step)?;
        let yaml = config.to_yaml()?;
        write_text(&run.path().join(CONFIG), &yaml)?;
        Ok(Self {
            student,
            optimizer,
            schedule,
            loader,
            held_out,
            metrics,
            spikes: SpikeDetector::default(),
            step,
            resumed: step,
            seconds: state.map_or(0.0, |state| state.seconds),
            stop: options.stop,
            run,
            config,
        })
    }

    /// The whole run: steps, evaluations and checkpoints until `max_steps`, then `final/`, `eval.json`, `samples/`
    /// and `loss.svg`.
    pub fn train(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        progress.begin(self.step, self.schedule.max_steps);
        if self.step > 0 {
            // The evaluation that followed the checkpoint, if one did, was cut from the log with it.
            self.evaluate_if_due(progress)?;
        }
        let mut saved_at = self.resumed;
        while self.step < self.schedule.max_steps && !self.is_stopped() {
            let metrics = self.train_step()?;
            progress.step(&metrics);
            let due = self.config.save_strategy == Strategy::Steps && self.step.is_multiple_of(self.config.save_steps);
            if due {
                self.save(progress)?;
                saved_at = self.step;
            }
            self.evaluate_if_due(progress)?;
        }
        if self.step > saved_at {
            self.save(progress)?;
        }
        if self.is_stopped() {
            return Ok(Outcome::Stopped { step: self.step });
        }
        self.finish(progress)
    }

    /// One optimizer step: forward and backward over `gradient_accumulation_steps` micro-batches, which together are
    /// one batch, and AdamW.
    ///
    /// # Errors
    /// [`NotFinite`], before any weight or running mean is touched.
    pub fn train_step(&mut self) -> Result<StepMetrics> {
        let start = Instant::now();
        let batches = self.next_batches()?;
        let data_wait = start.elapsed().as_secs_f64();
        let device = self.student.device();
        let uploaded: Vec<DeviceBatch> = batches.iter().map(|batch| DeviceBatch::new(batch, device)).collect();
        let num_targets = uploaded.iter().map(DeviceBatch::num_targets).sum::<i64>() as f64;
        let num_image_tokens = uploaded.iter().map(DeviceBatch::num_image_tokens).sum::<i64>().max(1) as f64;

        self.optimizer.zero_grad();
        let zero = || Tensor::zeros([], (Kind::Float, device));
        let (mut loss_lm, mut loss_distill, mut has_distill) = (zero(), zero(), false);
        for batch in &uploaded {
            let losses = self.student.losses(batch)?;
            let mut loss = losses.lm_sum / num_targets;
            loss_lm += loss.detach();
            if let Some(distill) = losses.distill {
                let distill = distill * (batch.num_image_tokens() as f64 / num_image_tokens);
                loss_distill += distill.detach();
                loss += distill * self.config.distill.weight;
                has_distill = true;
            }
            loss.backward();
        }

        // The one place where the host waits for the device.
        let read = Tensor::stack(&[loss_lm, loss_distill, self.optimizer.grad_norm()?], 0).to_kind(Kind::Double);
        let read = Vec::<f64>::try_from(read)?;
        let (loss_lm, loss_distill, grad_norm) = (read[0], read[1], read[2]);
        let step = self.step + 1;
        if !read.iter().all(|value| value.is_finite()) {
            let samples = self.culprits(&batches, &uploaded)?;
            bail!(NotFinite { step, loss_lm, loss_distill, grad_norm, samples });
        }
        let factor = self.schedule.factor(self.step);
        self.optimizer.step(factor, grad_norm)?;
        self.step = step;

        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        let num_tokens: i64 = batches.iter().map(|batch| batch.spans.num_tokens()).sum();
        let num_samples: usize = batches.iter().map(|batch| batch.samples.len()).sum();
        let loss = loss_lm + self.config.distill.weight * loss_distill;
        if let Some(sigmas) = self.spikes.observe(loss) {
            let ids = ids(&batches).join(", ");
            tracing::warn!("step {step}: the loss, {loss:.4}, lies {sigmas:.1} standard deviations above the last ones, on {ids}");
        }
        let metrics = StepMetrics {
            step,
            loss,
            loss_lm,
            loss_distill: has_distill.then_some(loss_distill),
            baseline_distill: self.student.distill.as_ref().and_then(|d| d.mean()).map(TeacherMean::baseline),
            lr: self.config.learning_rate * factor,
            grad_norm,
            samples_per_second: num_samples as f64 / seconds,
            tokens_per_second: num_tokens as f64 / seconds,
            data_wait,
            seconds: self.seconds,
        };
        if step.is_multiple_of(self.config.logging_steps) || step == self.schedule.max_steps {
            self.metrics.write(&Line::Step(metrics.clone()))?;
        }
        Ok(metrics)
    }

    /// Asks about every held-out split, seeing and blind; none where the run was told to stop meanwhile.
    pub fn evaluate(&self, progress: &mut dyn Progress) -> Result<Option<EvalReport>> {
        eval::evaluate(
            &self.student,
            &self.held_out,
            self.config.per_device_eval_batch_size,
            self.config.dataloader_num_workers,
            &self.stop,
            progress,
        )
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Everything trained, by its name on disk.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.student.parameters()
    }

    /// Writes a checkpoint and draws the plot anew.
    pub fn save(&self, progress: &mut dyn Progress) -> Result<PathBuf> {
        let yaml = self.config.to_yaml()?;
        let state = TrainerState {
            step: self.step,
            samples_seen: self.loader.position(),
            seconds: self.seconds,
            seed: self.config.seed,
            random: RANDOM.to_owned(),
            config_sha256: checkpoint::sha256(yaml.as_bytes()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let folder = self.run.save(self.step, self.config.save_total_limit, |folder| {
            saved::write(&self.student, folder)?;
            save(&folder.join(OPTIMIZER), &self.optimizer.state(), &[])?;
            if let Some(mean) = self.student.distill.as_ref().and_then(|d| d.mean()) {
                save(&folder.join(TEACHER_MEAN), &mean.state(), &[])?;
            }
            write_text(&folder.join(CONFIG), &yaml)?;
            state.save(folder)
        })?;
        self.plot()?;
        progress.saved(&folder);
        Ok(folder)
    }

    /// What is left to do once the last step is done and saved.
    fn finish(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        self.run.save_folder("final", |folder| saved::write(&self.student, folder))?;
        samples::write(&self.run.path().join("samples"), &self.held_out, self.student.processor(), SAMPLES)?;
        let Some(report) = self.evaluate(progress)? else {
            return Ok(Outcome::Stopped { step: self.step });
        };
        report.save(&self.run.path().join("eval.json"))?;
        self.log(&report, progress)?;
        self.plot()?;
        Ok(Outcome::Finished(report))
    }

    /// An evaluation between steps, where the run file asks for one here; the last step's is left to the end.
    fn evaluate_if_due(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let due = self.config.evaluation_strategy == Strategy::Steps && self.step.is_multiple_of(self.config.eval_steps);
        if due && self.step < self.schedule.max_steps && let Some(report) = self.evaluate(progress)? {
            self.log(&report, progress)?;
            self.plot()?;
        }
        Ok(())
    }

    fn log(&mut self, report: &EvalReport, progress: &mut dyn Progress) -> Result<()> {
        let metrics = EvalMetrics { step: self.step, eval: report.clone() };
        progress.evaluated(&metrics);
        self.metrics.write(&Line::Eval(metrics))
    }

    fn plot(&self) -> Result<()> {
        let path = self.run.path();
        let title = match &self.config.run_name {
            Some(name) => name.clone(),
            None => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        plot::draw(&path.join("loss.svg"), &title, &MetricsLog::read(&path.join("metrics.jsonl"))?)
    }

    fn next_batches(&mut self) -> Result<Vec<Batch>> {
        let next = |_| self.loader.next().context("the data has come to its end")?;
        (0..self.config.gradient_accumulation_steps).map(next).collect()
    }

    /// Whose hidden states are not finite.
    fn culprits(&self, batches: &[Batch], uploaded: &[DeviceBatch]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for (batch, uploaded) in batches.iter().zip(uploaded) {
            let output = tch::no_grad(|| self.student.model.forward(&uploaded.input, 0))?;
            for (row, sample) in batch.samples.iter().enumerate() {
                let len = batch.spans.rows[row].iter().map(|span| span.len).sum();
                let hidden = output.last_hidden_state.get(row as i64).narrow(0, 0, len); // [len, hidden]
                if hidden.isfinite().all().int64_value(&[]) == 0 {
                    found.push(sample.id.clone());
                }
            }
        }
        Ok(if found.is_empty() { ids(batches) } else { found })
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn ids(batches: &[Batch]) -> Vec<String> {
    batches.iter().flat_map(|batch| &batch.samples).map(|sample| sample.id.clone()).collect()
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |file| Ok(std::io::Write::write_all(file, text.as_bytes())?))
}

/// Where the run goes on: none for a new one. A folder that already holds a run is not written over by mistake.
fn last_checkpoint(run: &RunFolder, config: &TrainConfig, resume: bool) -> Result<Option<PathBuf>> {
    if !resume {
        if config.overwrite_output_dir {
            run.clear()?;
        } else if let Some((step, _)) = checkpoint::list(run.path())?.last() {
            bail!(
                "{} already holds a run of {step} steps; go on with --resume, or choose another output_dir, or set \
                 overwrite_output_dir=true",
                run.path().display()
            );
        }
        return Ok(None);
    }
    let Some(folder) = checkpoint::latest(run.path())? else {
        tracing::info!("{} has no checkpoint: the run begins at its start", run.path().display());
        return Ok(None);
    };
    let text = std::fs::read_to_string(folder.join(CONFIG))?;
    let saved = TrainConfig::parse(&text, &[]).with_context(|| format!("in {}", folder.join(CONFIG).display()))?;
    let (refused, changed): (Vec<_>, Vec<_>) =
        saved.differences(config)?.into_iter().partition(|difference| shapes_the_model(&difference.key));
    let list = |differences: &[crate::config::Difference]| {
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    ensure!(refused.is_empty(), "cannot resume from {}: {}", folder.display(), list(&refused));
    if !changed.is_empty() {
        tracing::warn!("resuming with other settings: {}", list(&changed));
    }
    Ok(Some(folder))
}

/// Whether another value of this key is another model; where models lie may change.
fn shapes_the_model(key: &str) -> bool {
    let place = ["model.llm", "model.aux_vision", "model.pretrained"].contains(&key);
    (key.starts_with("model.") && !place) || key == "distill.pairing" || key == "distill.center"
}

/// Reads weights, optimizer and the teacher's mean from a checkpoint.
fn restore(student: &mut Student, optimizer: &mut Optimizer, folder: &Path) -> Result<()> {
    saved::read(student, folder)?;
    optimizer.load_state(&Checkpoint::open(&folder.join(OPTIMIZER))?)?;
    let (device, path) = (student.device(), folder.join(TEACHER_MEAN));
    if let (Some(distill), true) = (&mut student.distill, path.exists()) {
        distill.set_mean(TeacherMean::load(&Checkpoint::open(&path)?, device)?);
    }
    Ok(())
}

/// Steps of the run, by number or by passes over the data.
fn max_steps(config: &TrainConfig, training: &dyn Source) -> Result<u64> {
    if let Ok(steps) = u64::try_from(config.max_steps) {
        return Ok(steps);
    }
    let samples = training.len().context("max_steps is -1, but the data never ends")?;
    let per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    Ok((samples as f64 * config.num_train_epochs / per_step as f64).ceil().max(1.0) as u64)
}

/// Looks at the first pictures of the training data through the teacher's eyes.
fn measure_teacher(student: &mut Student, config: &TrainConfig, training: &Arc<dyn Source>) -> Result<()> {
    let device = student.device();
    let Some(distill) = &mut student.distill else { return Ok(()) };
    let mut pictures: Vec<Tensor> = Vec::new();
    let tries = training.len().unwrap_or(u64::MAX).min(4 * config.distill.mean_over as u64);
    for index in 0..tries {
        let Ok(sample) = training.sample(index) else { continue };
        pictures.extend(sample.images.iter().map(|pixels| pixels.to_tensor()));
        if pictures.len() >= config.distill.mean_over {
            break;
        }
    }
    if let Some(size) = pictures.first().map(Tensor::size) {
        pictures.retain(|picture| picture.size() == size);
    }
    if pictures.len() < 2 {
        ensure!(!config.distill.center, "distill.center needs pictures, the data has too few");
        return Ok(());
    }
    let batches: Vec<Tensor> =
        pictures.chunks(config.per_device_eval_batch_size).map(|chunk| Tensor::stack(chunk, 0).to_device(device)).collect();
    distill.measure_mean(&batches, config.distill.center)
}
