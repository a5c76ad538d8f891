//! The trainer: both losses, one backward pass, one AdamW step, and everything around them that makes a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use thiserror::Error;
use vora_data::{Batch, Loader, LoaderConfig, Source};
use vora_llm::{Recompute, Tokenizer};
use vora_torch::safetensors::{Checkpoint, save, write_bytes};

use crate::best::{self, Best};
use crate::block_maps::BlockMaps;
use crate::board::Board;
use crate::checkpoint::{self, Keep, RunFolder, Saver, TrainerState};
use crate::config::{Strategy, TrainConfig};
use crate::data::{self, HeldOut};
use crate::distill::TeacherMean;
use crate::ema::{Ema, InPlace};
use crate::eval::{self, EvalReport};
use crate::loss_scale::LossScale;
use crate::metrics::{EvalMetrics, EventKind, EventMetrics, Line, MetricsLog, Progress, SpikeDetector, StepMetrics};
use crate::optim::Optimizer;
use crate::results::{TrainResults, machine, memory, peak_memory};
use crate::samples::Shown;
use crate::schedule::Schedule;
use crate::student::{DeviceBatch, Student};
use crate::tree::Difference;
use crate::{plan, plot, samples, saved, vq};

const CONFIG: &str = "config.yaml";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const TEACHER_MEAN: &str = "teacher_mean.safetensors";
const RANDOM: &str =
    "scenes: ChaCha8 of (seed, split, index); order: Feistel network of SplitMix64; new weights: by seed and name";

/// Held-out pictures of each split that are written for asking.
const SAMPLES: u64 = 8;

/// A run of as many skipped steps stops: then it is not a batch that is wrong.
const MOST_SKIPPED_IN_A_ROW: u64 = 3;

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
    /// Set by a signal: the run then saves a checkpoint, clears this and goes on.
    pub save: Arc<AtomicBool>,
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

/// A step that changed no weight. One is skipped; a run of them is the error that ends the training.
#[derive(Debug, Clone, Error, PartialEq)]
#[error(
    "step {step} is not finite (language loss {loss_lm}, distillation loss {loss_distill}, gradient norm {grad_norm}) \
     on {}; no weight was changed", samples.join(", ")
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
    run: Arc<RunFolder>,
    saver: Saver,
    student: Student,
    optimizer: Optimizer,
    ema: Option<Ema>,
    loss_scale: Option<LossScale>, // in f16
    schedule: Schedule,
    training: Arc<dyn Source>,
    loader: Loader,
    held_out: Vec<HeldOut>,
    metrics: MetricsLog,
    board: Option<Board>,
    tokenizer: Arc<Tokenizer>,
    spikes: SpikeDetector,
    step: u64,             // done so far
    skipped_steps: u64,    // of them
    skipped_in_a_row: u64, // and the last of them
    best: Option<Best>,
    resumed: u64,   // done when this process began
    truncated: u64, // samples in this process that lost turns
    seconds: f64,
    stop: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

impl Trainer {
    /// Opens everything: run folder, models, data; reads the last checkpoint where the run is resumed.
    ///
    /// # Errors
    /// Whatever does not fit, by name: a run folder in use or already full, a model that is missing, an adapter of
    /// another rank.
    pub fn new(config: TrainConfig, options: Options<'_>) -> Result<Self> {
        let run = Arc::new(RunFolder::lock(&config.output_dir)?);
        let last = last_checkpoint(&run, &config, options.resume)?;
        let state = last.as_deref().map(TrainerState::open).transpose()?;
        for (key, reason) in config.without_effect() {
            tracing::warn!("{key} has no effect here: {reason}");
        }

        let (program, kind) = (memory(options.device).unwrap_or(0), config.kind(options.device)?);
        let mut student = Student::new(&config, options.device, kind, options.resolve)?;
        let maker = data::sample_maker(&config, &student)?;
        let training = data::training(&config, &maker)?;
        let held_out = data::held_out(&config, &maker)?;
        plan::warn_if_short(&config, &student, &training, program);

        let mut optimizer = Optimizer::new(student.parameters(), config.optim())?;
        let mut ema = config.ema_decay.map(|decay| Ema::new(&student.parameters(), decay));
        if let Some(folder) = &last {
            restore(&mut student, &mut optimizer, ema.as_mut(), folder)
                .with_context(|| format!("cannot resume from {}", folder.display()))?;
        } else {
            measure_teacher(&mut student, &config, &training)?;
        }

        let (step, start) = state.as_ref().map_or((0, 0), |state| (state.step, state.samples_seen));
        let held = state.as_ref().map_or(Vec::new(), |state| state.samples_held.clone());
        let skipped = state.as_ref().map_or((0, 0), |state| (state.skipped_steps, state.skipped_in_a_row));
        let schedule = config.schedule(max_steps(&config, training.as_ref())?);
        let loader = Loader::new(
            training.clone(),
            LoaderConfig {
                batch_size: config.per_device_train_batch_size,
                row_len: config.packed_row_len(),
                num_workers: config.dataloader_num_workers,
                shuffle: config.shuffle,
                seed: config.seed,
                group_by_modality: config.data.train.group_by_modality,
                start,
                held,
                ..LoaderConfig::default()
            },
        )?;
        let metrics = MetricsLog::open(&run.path().join("metrics.jsonl"), step)?;
        let board = config.reports_to_tensorboard().then(|| Board::open(run.path(), step)).transpose()?;
        let yaml = config.to_yaml()?;
        write_bytes(&run.path().join(CONFIG), yaml.as_bytes())?;
        Ok(Self {
            saver: Saver::new(run.clone()),
            student,
            optimizer,
            ema,
            loss_scale: config.fp16.then(|| state.as_ref().and_then(|state| state.loss_scale).unwrap_or_default()),
            schedule,
            training,
            loader,
            held_out,
            metrics,
            board,
            tokenizer: maker.tokenizer.clone(),
            spikes: SpikeDetector::default(),
            step,
            skipped_steps: skipped.0,
            skipped_in_a_row: skipped.1,
            best: state.as_ref().and_then(|state| state.best),
            resumed: step,
            truncated: 0,
            seconds: state.map_or(0.0, |state| state.seconds),
            stop: options.stop,
            save: options.save,
            run,
            config,
        })
    }

    /// The whole run: steps, evaluations and checkpoints until `max_steps`, then `final/`, `eval.json`, `samples/`,
    /// `block_maps/` and `loss.svg`.
    pub fn train(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        if self.step == 0 {
            vq::train(&self.student, &self.config, &*self.training, &self.stop, progress)?;
        }
        progress.begin(self.step, self.schedule.max_steps);
        if self.step > 0 {
            // The evaluation that followed the checkpoint, if one did, was cut from the log with it.
            self.evaluate_if_due(progress)?;
        }
        let mut saved_at = self.resumed;
        while self.step < self.schedule.max_steps && !self.is_stopped() {
            let metrics = self.train_step()?;
            progress.step(&metrics);
            if let Some(folder) = self.saver.written()? {
                progress.saved(&folder);
            }
            let due = self.config.save_strategy == Strategy::Steps && self.step.is_multiple_of(self.config.save_steps);
            // Among skipped steps the weights themselves may be what is wrong: the checkpoints before are the better ones.
            let due = due && self.skipped_in_a_row == 0;
            if due || self.save.swap(false, Ordering::Relaxed) {
                self.begin_save(progress)?;
                saved_at = self.step;
            }
            self.evaluate_if_due(progress)?;
        }
        if self.step > saved_at {
            self.begin_save(progress)?;
        }
        self.wait_for_save(progress)?;
        if self.is_stopped() {
            return Ok(Outcome::Stopped { step: self.step });
        }
        self.finish(progress)
    }

    /// One optimizer step: forward and backward over `gradient_accumulation_steps` micro-batches, which together are
    /// one batch, and AdamW. In f16 a gradient that overflows is left out, with its samples, and the next ones take its
    /// place.
    ///
    /// A step whose loss or gradient is not finite is skipped: no weight and no running mean is touched, the data goes
    /// on, and, as with HF's trainer where a scaler leaves a step out, it is counted as a step done while the learning
    /// rate's schedule waits for the next one that is taken. Its numbers go into the log as an event.
    ///
    /// # Errors
    /// [`NotFinite`] at the third skipped step in a row.
    pub fn train_step(&mut self) -> Result<StepMetrics> {
        let start = Instant::now();
        let too_long_before = self.loader.num_too_long();
        let batches = self.next_batches()?;
        let data_wait = start.elapsed().as_secs_f64();
        let device = self.student.device();
        let uploaded: Vec<DeviceBatch> = batches.iter().map(|batch| DeviceBatch::new(batch, device)).collect();
        let num_targets = uploaded.iter().map(|batch| self.student.num_targets(batch)).sum::<i64>() as f64;
        let num_image_tokens = uploaded.iter().map(DeviceBatch::num_image_tokens).sum::<i64>().max(1) as f64;

        let distill_weight = self.config.distill.weight_at(self.step, self.schedule.max_steps);
        let scale = self.loss_scale.map_or(1.0, |loss_scale| f64::from(loss_scale.scale));

        self.optimizer.zero_grad()?;
        let zero = || Tensor::zeros([], (Kind::Float, device));
        let (mut loss_lm, mut loss_distill) = (zero(), zero());
        let mut distill_blocks: Option<Tensor> = None; // [blocks]
        for batch in &uploaded {
            let losses = self.student.losses(batch)?;
            let mut loss = losses.lm_sum / num_targets;
            loss_lm += loss.detach();
            let share = batch.num_image_tokens() as f64 / num_image_tokens;
            if let (Some(distill), Some(blocks)) = (losses.distill, losses.distill_blocks) {
                let (distill, blocks) = (distill * share, blocks * share);
                loss_distill += distill.detach();
                loss += distill * distill_weight;
                distill_blocks = Some(distill_blocks.map_or_else(|| blocks.shallow_clone(), |sum| sum + &blocks));
            }
            (if self.loss_scale.is_some() { loss * scale } else { loss }).backward();
            losses.recompute.map_or(Ok(()), Recompute::backward)?;
        }
        if self.loss_scale.is_some() {
            self.optimizer.scale_gradient(scale.recip())?;
        }

        // The one place where the host waits for the device.
        let mut read = vec![Tensor::stack(&[loss_lm, loss_distill, self.optimizer.grad_norm()?], 0)];
        read.extend(distill_blocks);
        let read = Vec::<f64>::try_from(Tensor::cat(&read, 0).to_kind(Kind::Double))?;
        let (loss_lm, loss_distill, grad_norm, distill_blocks) = (read[0], read[1], read[2], read[3..].to_vec());
        let step = self.step + 1;
        if let Some(loss_scale) = &mut self.loss_scale {
            let overflowed = !grad_norm.is_finite() && loss_lm.is_finite() && loss_distill.is_finite();
            loss_scale.update(overflowed);
            // A scale below 1 helps no gradient: it is not finite by itself.
            if overflowed && loss_scale.scale >= 1.0 {
                tracing::warn!(
                    "step {step}: the gradient overflowed f16 and is left out, the scale is {}",
                    loss_scale.scale
                );
                self.seconds += start.elapsed().as_secs_f64();
                return self.train_step();
            }
        }
        let factor = self.schedule.factor(self.step - self.skipped_steps);
        if !read.iter().all(|value| value.is_finite()) {
            let samples = self.culprits(&batches, &uploaded)?;
            self.skip(NotFinite { step, loss_lm, loss_distill, grad_norm, samples })?;
        } else {
            self.optimizer.step(factor, grad_norm)?;
            if let Some(ema) = &mut self.ema {
                ema.update(self.optimizer.parameters());
            }
            self.skipped_in_a_row = 0;
        }
        let is_skipped = self.skipped_in_a_row > 0;
        self.step = step;

        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        let num_tokens: i64 = batches.iter().map(|batch| batch.spans.num_tokens()).sum();
        let num_slots: i64 = batches.iter().map(|batch| batch.batch * batch.seq).sum();
        let num_samples: usize = batches.iter().map(|batch| batch.samples.len()).sum();
        let loss = loss_lm + distill_weight * loss_distill;
        if !is_skipped && let Some(sigmas) = self.spikes.observe(loss) {
            let samples = ids(&batches);
            let message =
                format!("step {step}: the loss, {loss:.4}, lies {sigmas:.1} standard deviations above the last ones");
            tracing::warn!("{message}, on {}", samples.join(", "));
            self.metrics.write(&Line::Event(EventMetrics { step, event: EventKind::LossSpike, message, samples }))?;
        }
        let metrics = StepMetrics {
            step,
            loss,
            loss_lm,
            loss_distill: (!distill_blocks.is_empty()).then_some(loss_distill),
            distill_blocks,
            baseline_distill: self.student.distill.as_ref().and_then(|d| d.mean()).map(TeacherMean::baseline),
            lr: self.config.learning_rate * factor,
            grad_norm,
            samples_per_second: num_samples as f64 / seconds,
            tokens_per_second: num_tokens as f64 / seconds,
            padding_share: 1.0 - num_tokens as f64 / num_slots as f64,
            truncated: batches.iter().flat_map(|batch| &batch.samples).filter(|s| s.cut_answers > 0).count() as u64,
            too_long: self.loader.num_too_long() - too_long_before,
            data_wait,
            memory: memory(self.student.device()),
            skipped_steps: self.skipped_steps,
            seconds: self.seconds,
        };
        self.truncated += metrics.truncated;
        if is_skipped {
            return Ok(metrics);
        }
        if step.is_multiple_of(self.config.logging_steps) || step == self.schedule.max_steps {
            self.metrics.write(&Line::Step(metrics.clone()))?;
            if let Some(board) = &mut self.board {
                board.step(&metrics)?;
            }
        }
        Ok(metrics)
    }

    /// Counts and tells of a step that is not finite.
    fn skip(&mut self, refused: NotFinite) -> Result<()> {
        self.skipped_steps += 1;
        self.skipped_in_a_row += 1;
        let message = refused.to_string();
        tracing::warn!("skipped: {message}");
        self.metrics.write(&Line::Event(EventMetrics {
            step: refused.step,
            event: EventKind::SkippedStep,
            message,
            samples: refused.samples.clone(),
        }))?;
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW {
            let in_a_row = format!("{MOST_SKIPPED_IN_A_ROW} steps in a row were skipped");
            return Err(anyhow::Error::new(refused).context(in_a_row));
        }
        Ok(())
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

    /// Writes a checkpoint and waits until it is whole.
    pub fn save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.begin_save(progress)?;
        self.wait_for_save(progress)
    }

    fn wait_for_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        if let Some(folder) = self.saver.wait()? {
            progress.saved(&folder);
        }
        Ok(())
    }

    /// Copies all that a checkpoint holds, begins to write it, and draws the plot anew. A save that is still being
    /// written is waited for.
    fn begin_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.wait_for_save(progress)?;
        let yaml = self.config.to_yaml()?;
        let state = TrainerState {
            step: self.step,
            samples_seen: self.loader.position(),
            samples_held: self.loader.held(),
            skipped_steps: self.skipped_steps,
            skipped_in_a_row: self.skipped_in_a_row,
            best: self.best,
            seconds: self.seconds,
            loss_scale: self.loss_scale,
            seed: self.config.seed,
            random: RANDOM.to_owned(),
            config_sha256: checkpoint::sha256(yaml.as_bytes()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let snapshot = saved::Snapshot::of(&self.student)?;
        let optimizer = saved::on_host(self.optimizer.state());
        let mean = self.student.distill.as_ref().and_then(|d| d.mean()).map(|mean| saved::on_host(mean.state()));
        let ema = self.ema.as_ref().map(|ema| saved::on_host(ema.state()));
        let keep = Keep { newest: self.config.save_total_limit, best: self.best.map(|best| best.step) };
        self.saver.begin(self.step, keep, move |folder| {
            snapshot.write(folder)?;
            save(&folder.join(OPTIMIZER), &optimizer, &[])?;
            if let Some(ema) = ema {
                save(&folder.join(EMA), &ema, &[])?;
            }
            if let Some(mean) = mean {
                save(&folder.join(TEACHER_MEAN), &mean, &[])?;
            }
            write_bytes(&folder.join(CONFIG), yaml.as_bytes())?;
            state.save(folder)
        })?;
        self.plot()
    }

    /// What is left to do once the last step is done and saved.
    fn finish(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        let _averaged = self.averaged();
        if !self.config.load_best_model_at_end {
            self.run.save_folder("final", |folder| saved::Snapshot::of(&self.student)?.write(folder))?;
        }
        self.results().save(self.run.path())?;
        let shown = samples::choose(&self.held_out, SAMPLES);
        samples::write(&self.run.path().join(samples::FOLDER), &shown, self.student.processor())?;
        if self.loader.num_skipped() > 0 {
            tracing::warn!(
                "{} bad records were left out, {} of them as not even their first answer fits into max_seq_len",
                self.loader.num_skipped(),
                self.loader.num_too_long()
            );
        }
        if self.truncated > 0 {
            tracing::warn!("{} samples lost turns at their end, to fit into max_seq_len", self.truncated);
        }
        let Some(mut report) = self.evaluate(progress)? else {
            return Ok(Outcome::Stopped { step: self.step });
        };
        if !report.0.is_empty() {
            self.log(&report, progress)?;
        }
        self.compare(&report)?;
        if self.config.load_best_model_at_end {
            if let Some(best) = self.best.filter(|best| best.step < self.step) {
                let folder = self.run.checkpoint(best.step);
                checkpoint::verify(&folder)?;
                saved::read(&self.student, &folder)?;
                let Some(of_best) = self.evaluate(progress)? else {
                    return Ok(Outcome::Stopped { step: self.step });
                };
                report = of_best;
            }
            self.run.save_folder("final", |folder| saved::Snapshot::of(&self.student)?.write(folder))?;
        }
        if !report.0.is_empty() {
            report.save(&self.run.path().join("eval.json"))?;
        }
        self.show(&shown)?;
        self.plot()?;
        Ok(Outcome::Finished(report))
    }

    /// The model has its averaged weights, where the run averages, until what is returned is dropped.
    fn averaged(&self) -> Option<InPlace> {
        self.ema.as_ref().map(|ema| ema.in_place(self.optimizer.parameters()))
    }

    fn results(&self) -> TrainResults {
        TrainResults {
            steps: self.step,
            train_runtime: self.seconds,
            train_steps_per_second: self.step as f64 / self.seconds,
            trained_parameters: self.parameters().iter().map(|(_, tensor)| tensor.numel() as u64).sum(),
            peak_memory: peak_memory(self.student.device()),
            machine: Some(machine(self.student.device())),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        }
    }

    /// An evaluation between steps, where the run file asks for one here; the last step's is left to the end.
    fn evaluate_if_due(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let due =
            self.config.evaluation_strategy == Strategy::Steps && self.step.is_multiple_of(self.config.eval_steps);
        if !due || self.held_out.is_empty() || self.step >= self.schedule.max_steps {
            return Ok(());
        }
        let _averaged = self.averaged();
        if let Some(report) = self.evaluate(progress)? {
            self.log(&report, progress)?;
            if self.step.is_multiple_of(self.config.save_steps) {
                self.compare(&report)?;
            }
            self.show(&samples::choose(&self.held_out, SAMPLES))?;
            self.plot()?;
        }
        Ok(())
    }

    fn log(&mut self, report: &EvalReport, progress: &mut dyn Progress) -> Result<()> {
        let metrics = EvalMetrics { step: self.step, eval: report.clone() };
        progress.evaluated(&metrics);
        if let Some(board) = &mut self.board {
            board.eval(&metrics)?;
        }
        self.metrics.write(&Line::Eval(metrics))
    }

    /// Takes this step's checkpoint for the best, where its evaluation says so.
    fn compare(&mut self, report: &EvalReport) -> Result<()> {
        if let Some(metric) = &self.config.metric_for_best_model {
            let greater_is_better = self.config.greater_is_better.unwrap_or(true);
            self.best = Best::better(self.best, self.step, best::value(report, metric)?, greater_is_better);
        }
        Ok(())
    }

    /// Shows what some held-out pictures look like from inside, and what is answered about them.
    fn show(&mut self, shown: &[Shown]) -> Result<()> {
        let maps = BlockMaps::measure(&self.student, shown)?;
        if let Some(maps) = &maps {
            maps.save(self.run.path(), self.step)?;
        }
        if let Some(board) = &mut self.board {
            let batch_size = self.config.per_device_eval_batch_size;
            let answers = samples::answers(&self.student, &self.tokenizer, shown, batch_size)?;
            board.samples(self.step, shown, &answers, self.student.processor())?;
            if let Some(maps) = &maps {
                board.block_maps(self.step, maps)?;
            }
        }
        Ok(())
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
            for sample in &batch.samples {
                let (start, len) = (sample.tokens.start as i64, sample.tokens.len() as i64);
                let hidden = output.last_hidden_state.get(sample.row as i64).narrow(0, start, len); // [len, hidden]
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
    let list = |differences: &[Difference]| differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    ensure!(refused.is_empty(), "cannot resume from {}: {}", folder.display(), list(&refused));
    if !changed.is_empty() {
        tracing::warn!("resuming with other settings: {}", list(&changed));
    }
    Ok(Some(folder))
}

/// Whether another value of this key is another model; where models lie may change.
fn shapes_the_model(key: &str) -> bool {
    let place = ["model.llm", "model.aux_vision", "model.vision_tower", "model.pretrained"].contains(&key);
    (key.starts_with("model.") && !place)
        || ["distill.pairing", "distill.center"].contains(&key)
        || key.starts_with("distill.blocks")
}

/// Reads weights, their average, optimizer and the teacher's mean from a checkpoint. An average that the checkpoint
/// lacks starts anew.
fn restore(student: &mut Student, optimizer: &mut Optimizer, ema: Option<&mut Ema>, folder: &Path) -> Result<()> {
    saved::read(student, folder)?;
    optimizer.load_state(&Checkpoint::open(&folder.join(OPTIMIZER))?)?;
    let averages = folder.join(EMA);
    if let (Some(ema), true) = (ema, averages.exists()) {
        ema.load_state(&Checkpoint::open(&averages)?)?;
    }
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
    let batches: Vec<Tensor> = pictures
        .chunks(config.per_device_eval_batch_size)
        .map(|chunk| Tensor::stack(chunk, 0).to_device(device))
        .collect();
    distill.measure_mean(&batches, config.distill.center)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_model::VisionLanguageModel;

    use crate::metrics::Silent;
    use crate::tensorboard;

    fn resolve(name: &str) -> Result<PathBuf> {
        Ok(fixtures::root().parent().context("the workspace")?.join(name))
    }

    /// A recipe with the tiny models, in `folder`.
    fn config(recipe: &str, folder: &Path, overrides: &[&str]) -> TrainConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(recipe);
        let mut all = vec![format!("output_dir={}", folder.display())];
        all.extend(overrides.iter().map(|&entry| entry.to_owned()));
        TrainConfig::open(&path, &all).unwrap()
    }

    fn try_new(config: TrainConfig, resume: bool) -> Result<Trainer> {
        let options =
            Options { device: Device::Cpu, resume, resolve: &resolve, stop: Arc::default(), save: Arc::default() };
        Trainer::new(config, options)
    }

    fn trainer(config: TrainConfig) -> Trainer {
        try_new(config, false).unwrap()
    }

    /// Copies, as the parameters themselves are trained on.
    fn weights(trainer: &Trainer) -> Vec<(String, Tensor)> {
        let state = trainer.optimizer.state().into_iter().map(|(name, t)| (format!("optimizer {name}"), t));
        trainer.parameters().into_iter().chain(state).map(|(name, t)| (name, t.detach().copy())).collect()
    }

    #[track_caller]
    fn assert_same(a: &[(String, Tensor)], b: &[(String, Tensor)]) {
        assert_eq!(a.len(), b.len());
        for ((name, a), (other, b)) in a.iter().zip(b) {
            assert_eq!(name, other);
            assert!(a.equal(b), "{name} differs by {}", (a - b).abs().max().double_value(&[]));
        }
    }

    fn losses(folder: &Path) -> Vec<(u64, f64, Option<f64>, f64)> {
        let lines = MetricsLog::read(&folder.join("metrics.jsonl")).unwrap();
        let step = |line| match line {
            Line::Step(s) => Some((s.step, s.loss_lm, s.loss_distill, s.grad_norm)),
            Line::Eval(_) | Line::Event(_) => None,
        };
        lines.into_iter().filter_map(step).collect()
    }

    /// Sets a flag after some step, as a signal does.
    struct StopAfter(u64, Arc<AtomicBool>);

    impl Progress for StopAfter {
        fn begin(&mut self, _: u64, _: u64) {}
        fn step(&mut self, metrics: &StepMetrics) {
            self.1.store(metrics.step == self.0, Ordering::Relaxed);
        }
        fn tokenizer_step(&mut self, _: u64, _: u64, _: f64) {}
        fn evaluating(&mut self, _: usize, _: usize) {}
        fn evaluated(&mut self, _: &EvalMetrics) {}
        fn saved(&mut self, _: &Path) {}
    }

    #[test]
    fn a_run_leaves_everything() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let mut trainer = trainer(config("smoke.yaml", run, &[]));
        let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
        assert_eq!(EvalReport::open(&run.join("eval.json")).unwrap(), report);
        for split in ["test", "unseen"] {
            let all = report.all(split).unwrap();
            assert!(all.n >= 8 && all.blind_exact_match.is_some(), "{split}: {all:?}");
        }
        let lines = MetricsLog::read(&run.join("metrics.jsonl")).unwrap();
        let evals = lines.iter().filter(|line| matches!(line, Line::Eval(_))).count();
        assert_eq!((lines.len(), evals), (10, 2)); // at steps 4 and 8
        let Line::Step(first) = &lines[0] else { panic!("the first line is a step") };
        assert!(first.baseline_distill.is_some_and(|b| b > 0.5) && first.memory.is_none_or(|bytes| bytes > 1 << 20));
        let mean = first.distill_blocks.iter().sum::<f64>() / first.distill_blocks.len() as f64;
        assert!(first.distill_blocks.len() == 2 && (mean - first.loss_distill.unwrap()).abs() < 1e-6, "{first:?}");
        assert!(std::fs::read_to_string(run.join("loss.svg")).unwrap().contains("without looking"));
        let again = TrainConfig::open(&run.join("config.yaml"), &[]).unwrap();
        assert_eq!(again, trainer.config);
        let steps: Vec<u64> = checkpoint::list(run).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [4, 8]);

        let questions = std::fs::read_to_string(run.join("samples/questions.jsonl")).unwrap();
        let first: serde_json::Value = serde_json::from_str(questions.lines().next().unwrap()).unwrap();
        let picture = vora_vision::open_image(&run.join("samples").join(first["image"].as_str().unwrap())).unwrap();
        assert_eq!(picture.dimensions(), (56, 56));
        assert_eq!(questions.lines().count(), 16);

        // What TensorBoard shows of it.
        let scalars = tensorboard::tests::scalars(run);
        let steps = |tag: &str| scalars.iter().filter(|s| s.0 == tag).map(|s| s.1).collect::<Vec<_>>();
        for tag in ["train/loss", "distill/block_00", "distill/block_01", "train/grad_norm"] {
            assert_eq!(steps(tag), (1..=8).collect::<Vec<_>>(), "{tag}");
        }
        for tag in ["eval/test/all", "eval/unseen/all/blind"] {
            assert_eq!(steps(tag), [4, 8], "{tag}");
        }
        let pictures = tensorboard::tests::shown(run);
        for tag in ["samples/test-0", "samples/unseen-7/answer", "block_maps", "block_maps/cosine"] {
            let steps: Vec<u64> = pictures.iter().filter(|p| p.0 == tag).map(|p| p.1).collect();
            assert_eq!(steps, [4, 8], "{tag}");
        }
        for step in [4, 8] {
            let text = std::fs::read(run.join(format!("block_maps/step-{step}.json"))).unwrap();
            let layout: crate::block_maps::Layout = serde_json::from_slice(&text).unwrap();
            assert_eq!(layout.pictures.iter().map(|p| p.cosines.len()).collect::<Vec<_>>(), [2; 4]);
            assert!(layout.pictures[0].cosines.iter().all(|cosine| cosine.abs() <= 1.0));
        }

        // What lies in final/ is the model that was trained.
        let model = saved::open(&run.join("final"), Device::Cpu, Kind::Float, &resolve).unwrap();
        let batch = DeviceBatch::new(&trainer.next_batches().unwrap()[0], Device::Cpu);
        let hidden = |model: &dyn VisionLanguageModel| {
            tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
        };
        fixtures::assert_close_to(&hidden(&*model), &hidden(&*trainer.student.model), 0.0);
    }

    /// The other ways to see, by their `model` sections.
    const OTHER_SYSTEMS: [&str; 5] = [
        "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}",
        "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
         mm_projector_type: linear, vision_feature_layer: [-1, 1], lora: {layers: 2, r: 4}}",
        "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
         freeze_llm: false}",
        "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 3, batch_size: 2, \
         num_embeddings: 32}}",
        "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, z_loss: 0, vqmodel: {steps: 1, batch_size: 1, \
         channel_multiplier: [1, 1, 1]}}",
    ];

    #[test]
    fn the_other_systems_are_trained_resumed_and_opened_again() {
        for model in OTHER_SYSTEMS {
            let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let config = |folder: &Path| config("smoke.yaml", folder, &[model, "bf16=false", "max_steps=5"]);
            let mut uninterrupted = trainer(config(whole.path()));
            let Outcome::Finished(report) = uninterrupted.train(&mut Silent).unwrap() else {
                panic!("nobody stopped it")
            };
            assert!(report.all("unseen").unwrap().blind_exact_match.is_some());

            let mut first = trainer(config(parts.path()));
            let stop = first.stop.clone();
            assert_eq!(first.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
            drop(first);
            let mut second = try_new(config(parts.path()), true).unwrap();
            second.train(&mut Silent).unwrap();
            assert_same(&weights(&uninterrupted), &weights(&second));
            assert_same(uninterrupted.student.made(), second.student.made());
            assert_eq!(losses(whole.path()), losses(parts.path()));

            let opened = saved::open(&whole.path().join("final"), Device::Cpu, Kind::Float, &resolve).unwrap();
            let batch = DeviceBatch::new(&uninterrupted.next_batches().unwrap()[0], Device::Cpu);
            let hidden = |model: &dyn VisionLanguageModel| {
                tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
            };
            fixtures::assert_close_to(&hidden(&*opened), &hidden(&*uninterrupted.student.model), 0.0);
        }
    }

    #[test]
    fn the_second_stage_of_a_llava_starts_from_the_first() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut stage_1 = trainer(config("smoke.yaml", first.path(), &[OTHER_SYSTEMS[0], "max_steps=2"]));
        stage_1.train(&mut Silent).unwrap();
        let from = |folder: &Path| format!("model.pretrained={}", folder.display());
        let settings = [OTHER_SYSTEMS[2], &from(&first.path().join("final"))];
        let stage_2 = trainer(config("smoke.yaml", second.path(), &settings));
        let projector = |trainer: &Trainer| {
            let mut parameters = trainer.parameters();
            parameters.retain(|(name, _)| name.starts_with("multi_modal_projector."));
            parameters
        };
        assert_eq!(projector(&stage_1).len(), 4);
        assert_same(&projector(&stage_1), &projector(&stage_2));
        drop(stage_2);
        let wrong = config("smoke.yaml", second.path(), &[OTHER_SYSTEMS[0], &from(Path::new("nowhere"))]);
        let error = format!("{:#}", try_new(wrong, false).err().unwrap());
        assert!(error.contains("model.pretrained: nowhere has no vision.safetensors"), "{error}");
    }

    const STAGE_2: [&str; 4] =
        ["model.lora=null", "model.freeze_llm=false", "model.reuse_aux_vision_embedding_layers=null", "bf16=false"];

    #[test]
    fn the_second_stage_of_a_vora_trains_all_weights_of_the_merged_first() {
        let [first, second, other, merged] = [(); 4].map(|()| tempfile::tempdir().unwrap());
        let mut stage_1 = trainer(config("smoke.yaml", first.path(), &["bf16=false", "max_steps=3"]));
        stage_1.train(&mut Silent).unwrap();
        let trained = first.path().join("final");
        let mut model = saved::open(&trained, Device::Cpu, Kind::Float, &resolve).unwrap();
        model.merge().unwrap();
        model.save(merged.path()).unwrap();
        saved::copy_beside(&trained, merged.path()).unwrap();
        let stage_2 = |run: &Path, from: &Path, more: &[&str]| {
            let from = format!("model.pretrained={}", from.display());
            let settings: Vec<&str> = STAGE_2.into_iter().chain([from.as_str()]).chain(more.iter().copied()).collect();
            config("smoke.yaml", run, &settings)
        };

        // A merged folder and the run it came from are the same start, but for the heads, which only the run has.
        let mut from_run = trainer(stage_2(other.path(), &trained, &[]));
        let from_merged = trainer(stage_2(second.path(), merged.path(), &[]));
        let without_heads = |trainer: &Trainer| {
            let mut parameters = trainer.parameters();
            parameters.retain(|(name, _)| !name.starts_with("aux_vision."));
            parameters
        };
        assert_same(&without_heads(&from_run), &without_heads(&from_merged));
        let heads = |trainer: &Trainer| {
            let mut parameters = trainer.parameters();
            parameters.retain(|(name, _)| name.starts_with("aux_vision.aux_layer_0."));
            parameters
        };
        assert_eq!(heads(&stage_1).len(), 2);
        assert_same(&heads(&stage_1), &heads(&from_run));

        // The first loss is the merged model's.
        let (mut sum, mut num_targets) = (0.0, 0.0);
        for batch in from_run.next_batches().unwrap() {
            let batch = DeviceBatch::new(&batch, Device::Cpu);
            let hidden = tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state;
            let hidden = hidden.flatten(0, 1).index_select(0, &batch.positions);
            let logits = |rows: &Tensor| model.llm().logits(rows);
            let loss = tch::no_grad(|| crate::loss::cross_entropy(&hidden, &batch.targets, i64::MAX, logits));
            sum += loss.double_value(&[]);
            num_targets += batch.targets.size()[0] as f64;
        }
        drop((from_run, from_merged));
        let mut tuned = trainer(stage_2(second.path(), merged.path(), &["max_steps=3"]));
        let start = weights(&tuned);
        let metrics = tuned.train_step().unwrap();
        assert!((metrics.loss_lm - sum / num_targets).abs() < 1e-6, "{} {}", metrics.loss_lm, sum / num_targets);
        assert!(metrics.loss_distill.is_some());
        let stop = tuned.stop.clone();
        assert_eq!(tuned.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
        drop(tuned);

        // Gone on with bit for bit, and what lies in final/ is a model that runs by itself.
        let mut resumed = try_new(stage_2(second.path(), merged.path(), &["max_steps=3"]), true).unwrap();
        resumed.train(&mut Silent).unwrap();
        let mut whole = trainer(stage_2(other.path(), merged.path(), &["max_steps=3"]));
        whole.train(&mut Silent).unwrap();
        assert_same(&weights(&whole), &weights(&resumed));
        for ((name, a), (_, b)) in start.iter().zip(&weights(&whole)).filter(|((name, _), _)| name.contains("_proj")) {
            assert!(!a.equal(b), "{name} was not trained");
        }
        let last = second.path().join("final");
        let batch = DeviceBatch::new(&whole.next_batches().unwrap()[0], Device::Cpu);
        let hidden = |model: &dyn VisionLanguageModel| {
            tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
        };
        let expected = hidden(&*whole.student.model);
        fixtures::assert_close_to(
            &hidden(&*vora_model::open(&last, Device::Cpu, Kind::Float).unwrap()),
            &expected,
            0.0,
        );
        let mut opened = saved::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap();
        opened.merge().unwrap();
        fixtures::assert_close_to(&hidden(&*opened), &expected, 0.0);
        assert_eq!(saved::stored_kind(&last, &resolve).unwrap(), Kind::Float);

        // With the adapters it has, a run goes on where the other ended.
        drop((whole, resumed));
        let from = |folder: &Path, more: &str| {
            let from = format!("model.pretrained={}", folder.display());
            config("smoke.yaml", other.path(), &["bf16=false", &from, more])
        };
        assert_same(&trainer(from(&trained, "max_steps=1")).parameters(), &stage_1.parameters());
        let error = |config: TrainConfig| format!("{:#}", try_new(config, false).err().unwrap());
        let merged_error = error(from(merged.path(), "max_steps=1"));
        assert!(merged_error.contains("model.pretrained: ") && merged_error.contains("is merged"), "{merged_error}");
        let rank_error = error(from(&trained, "model.lora.r=8"));
        assert!(rank_error.contains("r: 4") && rank_error.contains("r: 8"), "{rank_error}");
        let size_error = error(stage_2(other.path(), merged.path(), &["model.patch_size=28"]));
        assert!(size_error.contains("model.patch_size is 28") && size_error.contains("with 14"), "{size_error}");
    }

    #[test]
    fn the_average_is_evaluated_saved_and_goes_on_bit_for_bit() {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let with = |folder: &Path| config("smoke.yaml", folder, &["bf16=false", "max_steps=5", "ema_decay=0.6"]);
        let mut uninterrupted = trainer(with(whole.path()));
        uninterrupted.train(&mut Silent).unwrap();
        let mut first = trainer(with(parts.path()));
        let stop = first.stop.clone();
        first.train(&mut StopAfter(2, stop)).unwrap();
        drop(first);
        let mut second = try_new(with(parts.path()), true).unwrap();
        second.train(&mut Silent).unwrap();
        assert_same(&weights(&uninterrupted), &weights(&second));
        let average = |trainer: &Trainer| trainer.ema.as_ref().unwrap().state();
        assert_same(&average(&uninterrupted), &average(&second));

        // final/ has the average, the checkpoint beside it the weights themselves.
        let at = |name: &str| Checkpoint::open(&whole.path().join(name).join("vision.safetensors")).unwrap();
        let (last, checkpoint) = (at("final"), at("checkpoints/step-5"));
        let name = "vision_embedding.patchifier.proj.weight";
        let of = |tensors: &[(String, Tensor)]| tensors.iter().find(|(n, _)| n == name).unwrap().1.copy();
        assert!(last.tensor(name).unwrap().equal(&of(&average(&uninterrupted))));
        assert!(checkpoint.tensor(name).unwrap().equal(&of(&uninterrupted.parameters())));
        assert!(!last.tensor(name).unwrap().equal(&checkpoint.tensor(name).unwrap()));
    }

    #[test]
    fn a_scaled_loss_trains_the_same_and_an_overflow_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let train = |loss_scale: Option<LossScale>, steps: u64| {
            let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
            trainer.loss_scale = loss_scale;
            let norms: Vec<f64> = (0..steps).map(|_| trainer.train_step().unwrap().grad_norm).collect();
            (weights(&trainer), norms, trainer.loss_scale, trainer.loader.position())
        };
        let plain = train(None, 3);
        let scaled = train(Some(LossScale::default()), 3);
        // In f32 a power of two changes no digit.
        assert_same(&plain.0, &scaled.0);
        assert_eq!((&plain.1, scaled.2.unwrap().growth_tracker), (&scaled.1, 3));

        let huge = LossScale { scale: 2f32.powi(126), growth_tracker: 7 };
        let (_, norms, left, position) = train(Some(huge), 1);
        let left = left.unwrap();
        assert!(norms[0].is_finite() && left.scale < huge.scale && left.growth_tracker == 1, "{norms:?} {left:?}");
        let skipped = (huge.scale / left.scale).log2() as u64;
        assert_eq!(position, 4 * (skipped + 1));
    }

    #[test]
    fn teachers_of_other_grids_and_blocks_are_learned_from() {
        let folder = tempfile::tempdir().unwrap();
        let run = |settings: &[&str]| {
            let mut trainer = trainer(config("smoke.yaml", folder.path(), settings));
            let metrics = trainer.train_step().unwrap();
            (metrics.loss_distill.unwrap(), metrics.distill_blocks, trainer.parameters())
        };
        let (loss, blocks, _) = run(&["model.patch_size=7"]);
        assert!(loss.is_finite() && blocks.len() == 2);
        let (_, blocks, parameters) = run(&["distill.blocks={1: 0}", "distill.weight_schedule={type: linear, end: 0}"]);
        let heads: Vec<&str> =
            parameters.iter().map(|(name, _)| name.as_str()).filter(|name| name.starts_with("aux_vision")).collect();
        assert_eq!(
            (blocks.len(), heads),
            (1, vec!["aux_vision.aux_layer_1.0.weight", "aux_vision.aux_layer_1.1.weight"])
        );
    }

    /// Two pictures, two conversations about them, one of words alone and one about a picture that is not there.
    fn annotations(folder: &Path) -> String {
        for (name, side) in [("a.png", 40), ("b.png", 90)] {
            let picture = vora_vision::RgbImage::from_fn(side, 50, |x, y| [(x * 2) as u8, (y * 5) as u8, 90].into());
            picture.save(folder.join(name)).unwrap();
        }
        let record = |frames: &str, question: &str| {
            format!(
                r#"{{"frames": [{frames}], "conversations": [{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "a star"}}]}}"#
            )
        };
        let with = [r#""a.png""#, r#""b.png""#, r#""gone.png""#].map(|frame| record(frame, "<image>\\nWhat is it?"));
        std::fs::write(folder.join("pictures.jsonl"), with.join("\n")).unwrap();
        std::fs::write(folder.join("words.jsonl"), record("", "What is it?")).unwrap();
        let at = |name: &str| folder.join(name).display().to_string();
        format!(
            "data_paths: [{{anno_path: '{}', image_folder: '{}'}}, {{anno_path: '{}', image_folder: ''}}]",
            at("pictures.jsonl"),
            folder.display(),
            at("words.jsonl")
        )
    }

    #[test]
    fn annotations_are_learned_from_and_bad_ones_left_out() {
        let (data, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let fetch = annotations(data.path());
        let overrides = [
            format!(
                "data={{train: {{data_fetch: {{{fetch}}}}}, eval: {{same: {{data_fetch: {{{fetch}}}, samples: 9}}}}}}"
            ),
            "max_steps=-1".to_owned(),
            "num_train_epochs=3".to_owned(),
            "per_device_train_batch_size=1".to_owned(),
            "gradient_accumulation_steps=1".to_owned(),
            "distill.mean_over=2".to_owned(),
        ];
        let mut trainer = trainer(config("smoke.yaml", folder.path(), &overrides.each_ref().map(String::as_str)));
        let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
        // Three times four records are twelve steps; the bad one's places are taken by others.
        let losses = losses(folder.path());
        assert_eq!((losses.len(), trainer.loader.num_skipped()), (12, 4));
        assert!(losses.iter().any(|l| l.2.is_none()) && losses.iter().any(|l| l.2.is_some()), "words have no teacher");
        let turns = report.0["same"]["turn"];
        assert_eq!((turns.n, turns.blind_exact_match.is_some()), (3, true));
    }

    #[test]
    fn a_stopped_run_goes_on_bit_for_bit() {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut uninterrupted = trainer(config("debug.yaml", whole.path(), &[]));
        uninterrupted.train(&mut Silent).unwrap();

        let mut first = trainer(config("debug.yaml", parts.path(), &[]));
        let stop = first.stop.clone();
        assert_eq!(first.train(&mut StopAfter(7, stop)).unwrap(), Outcome::Stopped { step: 7 });
        drop(first);
        // Killed at step 12 without a word: what it did after the checkpoint is done again.
        let mut second = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
        for _ in 7..12 {
            second.train_step().unwrap();
        }
        drop(second);
        let mut third = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
        assert_eq!(third.step(), 7);
        assert!(matches!(third.train(&mut Silent).unwrap(), Outcome::Finished(_)));
        assert_same(&weights(&uninterrupted), &weights(&third));
        assert_eq!(losses(whole.path()), losses(parts.path()));
        // TensorBoard has each step once, and those that were done again from the last time.
        let losses_of = |run: &Path| {
            let mut scalars = tensorboard::tests::scalars(run);
            scalars.retain(|scalar| scalar.0.starts_with("train/loss") || scalar.0.starts_with("distill/"));
            scalars
        };
        assert_eq!(losses_of(whole.path()), losses_of(parts.path()));
        assert_eq!(losses_of(whole.path()).len(), 20 * (3 + 3));

        // And once more at its end: nothing is left to train.
        drop(third);
        let mut fourth = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
        assert!(matches!(fourth.train(&mut Silent).unwrap(), Outcome::Finished(_)));
        assert_same(&weights(&uninterrupted), &weights(&fourth));
    }

    #[test]
    fn mixed_streams_in_grouped_batches_go_on_bit_for_bit() {
        let shards = fixtures::root().join("golden/record_files");
        let data = |name: &str| format!("{{anno_path: \"{}\", weight: 1}}", shards.join(name).display());
        let overrides = [
            format!(
                "data={{train: {{scenes: {{}}, scenes_weight: 1, group_by_modality: true, \
                 data_fetch: {{data_paths: [{}, {}]}}}}}}",
                data("conversations.parquet"),
                data("shard.tar.gz")
            ),
            "per_device_train_batch_size=3".to_owned(),
            "distill.mean_over=2".to_owned(),
            "max_steps=9".to_owned(),
        ];
        let overrides = overrides.each_ref().map(String::as_str);
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut uninterrupted = trainer(config("smoke.yaml", whole.path(), &overrides));
        uninterrupted.train(&mut Silent).unwrap();
        let mut first = trainer(config("smoke.yaml", parts.path(), &overrides));
        let stop = first.stop.clone();
        assert_eq!(first.train(&mut StopAfter(7, stop)).unwrap(), Outcome::Stopped { step: 7 });
        drop(first);
        let folder = checkpoint::latest(parts.path()).unwrap().unwrap();
        assert!(!TrainerState::open(&folder).unwrap().samples_held.is_empty(), "a sample waits for its batch");
        let mut second = try_new(config("smoke.yaml", parts.path(), &overrides), true).unwrap();
        second.train(&mut Silent).unwrap();
        assert_same(&weights(&uninterrupted), &weights(&second));
        assert_eq!(losses(whole.path()), losses(parts.path()));
    }

    #[test]
    fn the_first_losses_are_those_on_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
        let path = fixtures::root().join("losses/debug_cpu.txt");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut found = String::new();
        let mut worst = 0f64;
        for line in text.lines() {
            let metrics = trainer.train_step().unwrap();
            let losses = [metrics.loss_lm, metrics.loss_distill.unwrap()];
            found += &format!("{} {}\n", losses[0], losses[1]);
            for (found, expected) in losses.iter().zip(line.split(' ')) {
                worst = worst.max((found - expected.parse::<f64>().unwrap()).abs());
            }
        }
        // On one machine they are the same; another processor rounds otherwise.
        assert!(trainer.step() == 20 && worst < 5e-3, "off by {worst}; now they are\n{found}");
    }

    #[test]
    fn nothing_is_reported_to_none() {
        let folder = tempfile::tempdir().unwrap();
        trainer(config("smoke.yaml", folder.path(), &["max_steps=1", "report_to=none"])).train(&mut Silent).unwrap();
        assert!(tensorboard::files(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn micro_batches_make_the_large_batch() {
        let step = |batch: usize, accumulation: usize| {
            let folder = tempfile::tempdir().unwrap();
            let overrides =
                [format!("per_device_train_batch_size={batch}"), format!("gradient_accumulation_steps={accumulation}")];
            let mut trainer = trainer(config("debug.yaml", folder.path(), &overrides.each_ref().map(String::as_str)));
            trainer.train_step().unwrap(); // at a rate of 0, in the warm-up
            (trainer.train_step().unwrap(), weights(&trainer))
        };
        let ((one, a), (four, b)) = (step(4, 1), step(1, 4));
        assert!((one.loss_lm - four.loss_lm).abs() < 1e-5, "{} {}", one.loss_lm, four.loss_lm);
        assert!((one.loss_distill.unwrap() - four.loss_distill.unwrap()).abs() < 1e-5);
        assert!((one.grad_norm / four.grad_norm - 1.0).abs() < 1e-3);
        // The running means are the gradients themselves, before AdamW makes them all of one size.
        for ((name, a), (_, b)) in a.iter().zip(&b).filter(|((name, _), _)| name.ends_with("exp_avg")) {
            let largest = a.abs().max().double_value(&[]).max(1e-6);
            let difference = (a - b).abs().max().double_value(&[]);
            assert!(difference < 1e-3 * largest, "{name}: {difference} of {largest}");
        }
    }

    #[test]
    fn layers_computed_anew_give_the_same_step() {
        for model in ["seed=0", OTHER_SYSTEMS[1], OTHER_SYSTEMS[3]] {
            let step = |checkpointing: &str| {
                let folder = tempfile::tempdir().unwrap();
                let mut trainer = trainer(config("smoke.yaml", folder.path(), &[model, "bf16=false", checkpointing]));
                for (name, tensor) in trainer.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
                    let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.01 + 1e-3 * (name.len() % 5) as f64));
                }
                let metrics = trainer.train_step().unwrap();
                let gradients = trainer.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad()));
                (metrics, gradients.collect::<Vec<_>>())
            };
            let (kept, anew) = (step("gradient_checkpointing=false"), step("gradient_checkpointing=true"));
            assert_eq!((kept.0.loss_lm, kept.0.loss_distill), (anew.0.loss_lm, anew.0.loss_distill), "{model}");
            let largest = kept.1.iter().map(|(_, g)| g.abs().max().double_value(&[])).fold(0.0, f64::max);
            for ((name, kept), (_, anew)) in kept.1.iter().zip(&anew.1) {
                assert!(kept.defined() && anew.defined(), "{model}: no gradient reaches {name}");
                let difference = (kept - anew).abs().max().double_value(&[]);
                assert!(difference <= 1e-6 * largest, "{model}: {name} differs by {difference} of {largest}");
            }
        }
    }

    #[test]
    fn it_learns() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(config("debug.yaml", folder.path(), &["max_steps=40"]));
        let metrics: Vec<StepMetrics> = (0..40).map(|_| trainer.train_step().unwrap()).collect();
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        let lm = |steps: &[StepMetrics]| mean(steps.iter().map(|m| m.loss_lm).collect());
        let distill = |steps: &[StepMetrics]| mean(steps.iter().filter_map(|m| m.loss_distill).collect());
        let (first, last) = (&metrics[..5], &metrics[35..]);
        assert!(lm(last) < 0.9 * lm(first), "{} -> {}", lm(first), lm(last));
        assert!(distill(last) < distill(first) - 0.02, "{} -> {}", distill(first), distill(last));
    }

    #[test]
    fn a_step_that_is_not_finite_is_skipped_and_a_run_of_them_stops() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
        trainer.train_step().unwrap();
        let (_, b) = trainer.parameters().into_iter().find(|(name, _)| name.contains("lora_B")).unwrap();
        let whole = b.detach().copy();
        let fill = |value: &Tensor| tch::no_grad(|| b.shallow_clone().copy_(value));
        fill(&whole.full_like(f64::NAN));
        let before = weights(&trainer);
        let skipped = trainer.train_step().unwrap();
        assert!(skipped.loss.is_nan() && (skipped.step, skipped.skipped_steps) == (2, 1), "{skipped:?}");
        for ((name, before), (_, after)) in before.iter().zip(&weights(&trainer)) {
            assert!(before.allclose(after, 0.0, 0.0, true), "{name} was touched");
        }

        // The schedule waits, the data goes on, and one good step ends the run of bad ones.
        fill(&whole);
        let rate = trainer.config.learning_rate * trainer.schedule.factor(1);
        let taken = trainer.train_step().unwrap();
        assert!(taken.loss.is_finite() && (taken.step, taken.skipped_steps, taken.lr) == (3, 1, rate), "{taken:?}");
        assert_eq!(trainer.loader.position(), 12);
        trainer.save(&mut Silent).unwrap();
        drop(trainer);

        let mut trainer = try_new(config("debug.yaml", folder.path(), &[]), true).unwrap();
        assert_eq!((trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row), (3, 1, 0));
        let (_, b) = trainer.parameters().into_iter().find(|(name, _)| name.contains("lora_B")).unwrap();
        let _ = tch::no_grad(|| b.shallow_clone().fill_(f64::NAN));
        trainer.train_step().unwrap();
        trainer.train_step().unwrap();
        let error = trainer.train_step().unwrap_err();
        let refused = error.downcast_ref::<NotFinite>().unwrap();
        assert_eq!((refused.step, refused.samples.len()), (6, 4));
        let error = format!("{error:#}");
        assert!(
            error.contains("3 steps in a row") && error.contains("step 6") && error.contains("train-20"),
            "{error}"
        );

        let lines = MetricsLog::read(&folder.path().join("metrics.jsonl")).unwrap();
        let told = lines.iter().filter_map(|line| if let Line::Event(event) = line { Some(event) } else { None });
        let told: Vec<_> = told.map(|e| (e.step, e.event, e.samples.len())).collect();
        assert_eq!(told, [2, 4, 5, 6].map(|step| (step, EventKind::SkippedStep, 4)));
    }

    #[test]
    fn a_spike_is_logged_with_its_batch() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
        for i in 0..128 {
            trainer.spikes.observe(0.01 * f64::from(i % 7));
        }
        trainer.train_step().unwrap();
        let lines = MetricsLog::read(&folder.path().join("metrics.jsonl")).unwrap();
        let Line::Event(event) = &lines[0] else { panic!("the first line is the event: {lines:?}") };
        assert_eq!((event.step, event.event, event.samples.len()), (1, EventKind::LossSpike, 4));
        assert!(matches!(lines[1], Line::Step(_)));
    }

    #[test]
    fn the_best_checkpoint_is_kept_and_becomes_the_final_model() {
        let folder = tempfile::tempdir().unwrap();
        let settings = [
            "metric_for_best_model=eval_test_exact_match",
            "load_best_model_at_end=true",
            "eval_steps=2",
            "save_steps=2",
            "save_total_limit=1",
            "report_to=none",
        ];
        let mut trainer = trainer(config("smoke.yaml", folder.path(), &settings));
        while trainer.step < 2 {
            trainer.train_step().unwrap();
        }
        trainer.save(&mut Silent).unwrap();
        let at_2: Vec<_> = trainer.parameters().into_iter().map(|(name, t)| (name, t.detach().copy())).collect();
        // As if the evaluation had found all right there: nothing can be better.
        trainer.best = Best::better(None, 2, 1.0, true);
        trainer.train(&mut Silent).unwrap();
        let steps: Vec<u64> = checkpoint::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [2, 8]);
        assert_same(&at_2, &trainer.parameters());
        let read = |path: &str| std::fs::read(folder.path().join(path).join("vision.safetensors")).unwrap();
        assert!(read("final") == read("checkpoints/step-2") && read("final") != read("checkpoints/step-8"));
        drop(trainer);
        let resumed = try_new(config("smoke.yaml", folder.path(), &settings), true).unwrap();
        assert_eq!((resumed.step, resumed.best), (8, Some(Best { step: 2, metric: 1.0 })));
    }

    #[test]
    fn a_checkpoint_of_one_kind_goes_on_in_another() {
        for (first, second) in [("bf16=true", "bf16=false"), ("bf16=false", "bf16=true")] {
            let folder = tempfile::tempdir().unwrap();
            let mut before = trainer(config("debug.yaml", folder.path(), &[first]));
            for _ in 0..3 {
                before.train_step().unwrap();
            }
            before.save(&mut Silent).unwrap();
            let saved = weights(&before);
            drop(before);
            let mut after = try_new(config("debug.yaml", folder.path(), &[second]), true).unwrap();
            assert_same(&saved, &weights(&after));
            assert!(after.train_step().unwrap().loss.is_finite());
        }
    }

    #[test]
    fn another_rank_is_refused_with_both_values() {
        let folder = tempfile::tempdir().unwrap();
        trainer(config("smoke.yaml", folder.path(), &["max_steps=1"])).train(&mut Silent).unwrap();
        let changed = config("smoke.yaml", folder.path(), &["model.lora.r=8", "model.lora.layers=3", "max_steps=2"]);
        let error = format!("{:#}", try_new(changed, true).err().unwrap());
        assert!(error.contains("cannot resume from") && error.contains("step-1"), "{error}");
        assert!(error.contains("model.lora.layers was 2, is 3; model.lora.r was 4, is 8"), "{error}");
        // Other settings may change.
        let changed = config("smoke.yaml", folder.path(), &["max_steps=2", "learning_rate=1e-4"]);
        assert_eq!(try_new(changed, true).unwrap().step(), 1);
    }

    #[test]
    fn a_run_is_not_written_over_by_mistake() {
        let folder = tempfile::tempdir().unwrap();
        let overrides = ["max_steps=1", "overwrite_output_dir=false"];
        let first = config("smoke.yaml", folder.path(), &overrides);
        let mut first = trainer(first);
        let error = try_new(config("smoke.yaml", folder.path(), &overrides), false).err().unwrap().to_string();
        assert!(error.contains("in use by another trainer"), "{error}");
        first.train(&mut Silent).unwrap();
        drop(first);
        let error = try_new(config("smoke.yaml", folder.path(), &overrides), false).err().unwrap().to_string();
        assert!(error.contains("already holds a run of 1 steps; go on with --resume"), "{error}");
        let over = config("smoke.yaml", folder.path(), &["max_steps=1"]);
        assert_eq!(trainer(over).step(), 0);
        assert!(checkpoint::list(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn a_damaged_checkpoint_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        trainer(config("smoke.yaml", folder.path(), &[])).train(&mut Silent).unwrap();
        let file = folder.path().join("checkpoints/step-8/optimizer.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(try_new(config("smoke.yaml", folder.path(), &[]), true).unwrap().step(), 4);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let fails = |overrides: &[&str], texts: &[&str]| {
            let error = format!("{:#}", try_new(config("smoke.yaml", folder.path(), overrides), false).err().unwrap());
            for text in texts {
                assert!(error.contains(text), "`{error}` lacks `{text}`");
            }
        };
        fails(&["model.llm=fixtures/nowhere"], &["fixtures/nowhere", "config.json"]);
        fails(
            &["model.aux_vision=fixtures/tiny/llm"],
            &["model.aux_vision", "`llama` is not a vision encoder known here"],
        );
        fails(&["model.lora.layers=5"], &["model.lora.layers is 5", "has 4 layers"]);
        fails(
            &["model.image_size=49", "model.patch_size=7", "data.train.scenes.image_size=49"],
            &["a multiple of the teacher's patch size, 14"],
        );
        fails(&["distill.blocks={4: 0}"], &["distill.blocks has the LLM's block 4, it has 4 from 0 on"]);
        fails(&["distill.blocks={0: 9}"], &["distill.blocks gives block 0 the teacher's 9"]);
        fails(&["fp16=true", "bf16=false"], &["fp16", "needs a GPU"]);
        fails(&["model.vision_embedding_intermediate_size=32"], &["32 channels", "teacher of 24"]);
        fails(&["learning_rates={lora_C: 1}"], &["learning_rates.lora_C"]);
        fails(&["model.pretrained=x"], &["model.pretrained", "x/config.json"]);
    }
}
