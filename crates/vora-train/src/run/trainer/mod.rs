//! The trainer: both losses, one backward pass, one AdamW step, and everything around them that makes a run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use thiserror::Error;
use vora_data::{Batch, Loader, LoaderConfig, SampleMaker, Source};
use vora_files::write_bytes;
use vora_llm::{DropoutSeed, Recompute};
use vora_run::eval::EvalReport;
use vora_run::metrics::{EvalMetrics, EventKind, EventMetrics, Line, MetricsLog, StepMetrics};
use vora_run::plot;
use vora_run::results::TrainResults;
use vora_text::Tokenizer;
use vora_torch::memory::{machine, memory, peak_memory};
use vora_torch::safetensors::save;

use crate::config::run::{Strategy, TrainConfig};
use crate::data::{self, HeldOut};
use crate::observe::block_maps::BlockMaps;
use crate::observe::board::Board;
use crate::observe::samples;
use crate::observe::samples::Shown;
use crate::run::best::{self, Best};
use crate::run::checkpoint::{self, Keep, RunFolder, Saver, TrainerState};
use crate::run::evaluate::evaluate;
use crate::run::progress::Progress;
use crate::run::spikes::SpikeDetector;
use crate::run::{plan, snapshot, vq};
use crate::step::ema::{Ema, InPlace};
use crate::step::loss_scale::LossScale;
use crate::step::optim::Optimizer;
use crate::step::schedule::Schedule;
use crate::student::heads::TeacherMean;
use crate::student::{DeviceBatch, Student, parts};

mod resume;
#[cfg(test)]
mod tests;

const CONFIG: &str = "config.yaml";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const TEACHER_MEAN: &str = "teacher_mean.safetensors";
const RANDOM: &str = "scenes: ChaCha8 of (seed, split, index); order: Feistel network of SplitMix64; new weights: by seed and name; \
     dropout: libtorch's generator by (seed, step, micro-batch, layer)";

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
        let last = resume::last_checkpoint(&run, &config, options.resume)?;
        let state = last.as_deref().map(TrainerState::open).transpose()?;
        for (key, reason) in config.without_effect() {
            tracing::warn!("{key} has no effect here: {reason}");
        }

        let (program, kind) = (memory(options.device).unwrap_or(0), config.kind(options.device)?);
        let mut student = Student::new(&config, options.device, kind, options.resolve)?;
        let maker = Arc::new(SampleMaker::new(student.preparation().clone()));
        let training = data::training(&config, &maker)?;
        let held_out = data::held_out(&config, &maker)?;
        plan::warn_if_short(&config, &student, &training, program);

        let mut optimizer = Optimizer::new(student.parameters(), config.optim())?;
        let mut ema = config.ema_decay.map(|decay| Ema::new(&student.parameters(), decay));
        if let Some(folder) = &last {
            resume::restore(&mut student, &mut optimizer, ema.as_mut(), folder)
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
        let yaml = config.to_yaml()?;
        // The last act of opening: whatever was wrong with the new run, the old one is still there.
        if !options.resume && config.overwrite_output_dir {
            run.clear()?;
        }
        let metrics = MetricsLog::open(&run.path().join("metrics.jsonl"), step)?;
        let board = config.reports_to_tensorboard().then(|| Board::open(run.path(), step)).transpose()?;
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
            tokenizer: maker.preparation().tokenizer.clone(),
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
        let seed = DropoutSeed::new(self.config.seed).at(self.step);
        for (number, batch) in uploaded.iter().enumerate() {
            let losses = self.student.losses(batch, seed.at(number as u64))?;
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
        evaluate(
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
        let snapshot = snapshot::Snapshot::of(&self.student)?;
        let optimizer = snapshot::on_host(self.optimizer.state());
        let mean = self.student.distill.as_ref().and_then(|d| d.mean()).map(|mean| snapshot::on_host(mean.state()));
        let ema = self.ema.as_ref().map(|ema| snapshot::on_host(ema.state()));
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
            self.run.save_folder("final", |folder| snapshot::Snapshot::of(&self.student)?.write(folder))?;
        }
        self.results().save(self.run.path())?;
        let shown = samples::choose(&self.held_out, SAMPLES);
        samples::write(
            &self.run.path().join(vora_run::samples::FOLDER),
            &shown,
            &self.student.preparation().processor,
        )?;
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
                parts::read(&self.student, &folder)?;
                let Some(of_best) = self.evaluate(progress)? else {
                    return Ok(Outcome::Stopped { step: self.step });
                };
                report = of_best;
            }
            self.run.save_folder("final", |folder| snapshot::Snapshot::of(&self.student)?.write(folder))?;
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
            board.samples(self.step, shown, &answers, &self.student.preparation().processor)?;
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
        pictures.extend(sample.images.iter().map(vora_vision::pixel_values));
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
