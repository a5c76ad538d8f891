//! The trainer: both losses, one backward pass, one AdamW step, and everything around them that makes a run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tch::Tensor;
use vora_data::{Loader, LoaderConfig, SampleMaker, Source};
use vora_eval::language::{Side, language};
use vora_files::write_bytes;
use vora_recipe::{Schedule, Strategy, TrainConfig};
use vora_run::eval::EvalReport;
use vora_run::language::Language;
use vora_run::metrics::{EvalMetrics, Line, MetricsLog, RankMetrics};
use vora_run::plot;
use vora_run::results::TrainResults;
use vora_text::Tokenizer;
use vora_torch::dist::Gradients;
use vora_torch::optim::Optimizer;
use vora_torch::runtime::{machine, memory, peak_memory};

use super::files::CONFIG;
use super::options::{Options, Outcome};
use super::{resume, teacher};
use crate::anchor::{Anchor, Texts};
use crate::data::{self, HeldOut, Sources};
use crate::observe::block_maps::BlockMaps;
use crate::observe::board::Board;
use crate::observe::samples;
use crate::observe::samples::Shown;
use crate::run::best::{self, Best};
use crate::run::evaluate::evaluate;
use crate::run::max_steps::max_steps;
use crate::run::progress::Progress;
use crate::run::ranks::Ranks;
use crate::run::spikes::SpikeDetector;
use crate::run::state::TrainerState;
use crate::run::{dtype, size, snapshot, vq};
use crate::step::ema::{Ema, InPlace};
use crate::step::loss_scale::LossScale;
use crate::step::optim::sharded;
use vora_run::checkpoint::{self, FINAL, RunFolder, Saver, Share};
use vora_student::{Student, parts};

/// Held-out pictures of each split that are written for asking.
const SAMPLES: u64 = 8;

/// One run.
pub struct Trainer {
    pub(super) config: TrainConfig,
    pub(super) ranks: Ranks,
    pub(super) run: Arc<RunFolder>,
    pub(super) saver: Saver,
    pub(super) share: Option<Share>, // of a checkpoint that several processes are writing
    pub(super) student: Student,
    pub(super) anchor: Option<Anchor>,
    pub(super) gradients: Option<Gradients>, // where several processes train
    pub(super) optimizer: Optimizer,
    pub(super) ema: Option<Ema>,
    pub(super) loss_scale: Option<LossScale>, // in f16
    pub(super) schedule: Schedule,
    pub(super) training: Arc<dyn Source>,
    pub(super) source_sha256: Option<String>,
    pub(super) loader: Loader,
    pub(super) held_out: Vec<HeldOut>,
    pub(super) metrics: Option<MetricsLog>, // of rank 0, as the board
    pub(super) rank_metrics: Option<MetricsLog<RankMetrics>>, // of each, where the run asks for it
    pub(super) board: Option<Board>,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) spikes: SpikeDetector,
    pub(super) step: u64,             // done so far
    pub(super) skipped_steps: u64,    // of them
    pub(super) skipped_in_a_row: u64, // and the last of them
    pub(super) best: Option<Best>,
    pub(super) resumed: u64,   // done when this process began
    pub(super) truncated: u64, // samples in this process that lost turns
    pub(super) seconds: f64,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) save: Arc<AtomicBool>,
}

/// A run before anything of it is opened: its folder, and the checkpoint that it goes on from.
struct Begun {
    config: TrainConfig,
    ranks: Ranks,
    run: Arc<RunFolder>,
    last: Option<PathBuf>,
    state: Option<TrainerState>,
    program: u64, // bytes that the process holds without the models
}

impl Begun {
    fn new(config: TrainConfig, options: &Options<'_>) -> Result<Self> {
        let config = config.checked()?;
        let ranks = Ranks::new(options.group.clone());
        ranks.same_run(&config)?;
        let run = ranks.first(|| RunFolder::lock(&config.output_dir))?;
        let run = Arc::new(run.unwrap_or_else(|| RunFolder::of_others(&config.output_dir)));
        let last = resume::last_of_all(&ranks, &run, &config, options.resume)?;
        let state = last.as_deref().map(TrainerState::open).transpose()?;
        for (key, reason) in config.without_effect().into_iter().filter(|_| ranks.is_first()) {
            tracing::warn!("{key} has no effect here: {reason}");
        }
        Ok(Self { config, ranks, run, last, state, program: memory(options.device).unwrap_or(0) })
    }

    fn student(&self, options: &Options<'_>) -> Result<Student> {
        let kind = dtype::kind(&self.config, options.device)?;
        match self.ranks.group().filter(|_| self.config.zero_stage == 3) {
            Some(group) => Student::sharded(&self.config, options.device, kind, options.resolve, group),
            None => Student::new(&self.config, options.device, kind, options.resolve),
        }
    }
}

impl Trainer {
    /// Opens everything: run folder, models, data; reads the last checkpoint where the run is resumed.
    ///
    /// # Errors
    /// Whatever does not fit, by name: a key of the config, a run folder in use or already full, a model that is missing, an
    /// adapter of another rank.
    pub fn new(config: TrainConfig, options: Options<'_>) -> Result<Self> {
        Ranks::new(options.group.clone()).told(Self::open(config, options))
    }

    fn open(config: TrainConfig, options: Options<'_>) -> Result<Self> {
        let begun = Begun::new(config, &options)?;
        let student = begun.student(&options)?;
        let maker = Arc::new(SampleMaker::new(student.preparation(&begun.config)?));
        let sources = Sources::open(&begun.config, &maker)?;
        Self::assemble(begun, options, student, &maker, sources)
    }

    /// The same on a program's own data, in place of what `config.data` names.
    ///
    /// # Errors
    /// As [`Trainer::new`]; where the run is resumed and the source gives other samples than when the run began.
    pub fn with_data(config: TrainConfig, options: Options<'_>, sources: Sources) -> Result<Self> {
        let begun = Begun::new(sources.named_in(config), &options)?;
        let student = begun.student(&options)?;
        let maker = Arc::new(SampleMaker::new(student.preparation(&begun.config)?));
        Self::assemble(begun, options, student, &maker, sources)
    }

    /// The same with a student that is made already, one of a program's own or with a teacher of its own, on a program's
    /// data or those of the run file ([`Sources::open`]). The `resolve` of `options` is not asked.
    ///
    /// # Errors
    /// As [`Trainer::with_data`].
    pub fn from_parts(config: TrainConfig, options: Options<'_>, student: Student, sources: Sources) -> Result<Self> {
        let begun = Begun::new(sources.named_in(config), &options)?;
        let maker = Arc::new(SampleMaker::new(student.preparation(&begun.config)?));
        // What the process holds by now has the student in it, which is counted by itself.
        Self::assemble(Begun { program: 0, ..begun }, options, student, &maker, sources)
    }

    fn assemble(
        begun: Begun,
        options: Options<'_>,
        mut student: Student,
        maker: &Arc<SampleMaker>,
        sources: Sources,
    ) -> Result<Self> {
        let Begun { config, ranks, run, last, state, program } = begun;
        if ranks.are_several() {
            ranks.same("data", &sources.seen())?;
        }
        let source_sha256 = sources.fingerprint(&config)?;
        resume::expect_source(state.as_ref(), source_sha256.as_deref(), &config)?;
        let (training, held_out) = sources.into_parts();
        ensure!(
            config.zero_stage < 3 || !ranks.are_several() || student.model.llm().decoder().shards().is_some(),
            "zero_stage is 3, and the student that was given keeps all of its weights: Student::sharded shares them out"
        );
        size::warn_if_short(&config, &student, &training, program, ranks.world_size());

        let (rank, world_size) = if config.zero_stage == 0 { (0, 1) } else { (ranks.rank(), ranks.world_size()) };
        let mut optimizer = sharded(student.parameters(), &config.optim(), rank, world_size)?;
        let mut ema = config.ema_decay.map(|decay| Ema::new(&student.parameters(), decay));
        if let Some(folder) = &last {
            resume::restore(&mut student, &mut optimizer, ema.as_mut(), folder)
                .with_context(|| format!("cannot resume from {}", folder.display()))?;
        } else {
            teacher::measure_teacher(&mut student, &config, &training)?;
        }

        ranks.copy_first(&student.parameters().iter().map(|(_, tensor)| tensor.detach()).collect::<Vec<_>>())?;
        let gradients = ranks.gradients(optimizer.parameters())?;

        let max_steps = max_steps(&config, training.as_ref(), ranks.world_size())?;
        let texts = config.text_anchor.as_ref().map(|anchor| {
            let count = anchor.num_texts(max_steps);
            let make = || match (&last, &anchor.data_fetch) {
                (Some(_), _) => Texts::open(run.path()),
                (None, Some(fetch)) => {
                    let source = data::of_fetch(fetch, &config, maker).context("text_anchor")?;
                    Texts::from_records(&*source, maker, anchor, count).context("text_anchor")
                }
                (None, None) => Texts::written(student.model.llm(), maker.preparation(), anchor, count, config.seed),
            };
            let made = student.apart(|| ranks.first(|| make()?.to_bytes()));
            Texts::from_bytes(&ranks.of_first(|| Ok(made?.unwrap_or_default()))?)
        });
        let texts = texts.transpose()?;
        let anchor = config.text_anchor.clone().zip(texts.as_ref());
        let anchor = anchor.map(|(anchor, texts)| Anchor::new(anchor, config.seed, texts, student.model.llm()));
        let anchor = anchor.transpose()?;

        let (step, start) = state.as_ref().map_or((0, 0), |state| (state.step, state.samples_seen));
        let held = state.as_ref().map_or(Vec::new(), |state| state.samples_held.clone());
        let skipped = state.as_ref().map_or((0, 0), |state| (state.skipped_steps, state.skipped_in_a_row));
        let schedule = config.schedule(max_steps);
        let walk = LoaderConfig {
            batch_size: config.per_device_train_batch_size,
            row_len: config.packed_row_len(),
            shares_starts: student.shares_starts(),
            num_workers: config.dataloader_num_workers,
            shuffle: config.shuffle,
            seed: config.seed,
            group_by_modality: config.data.train.group_by_modality,
            rank: ranks.rank() as u64,
            world_size: ranks.world_size() as u64,
            start,
            held,
            ..LoaderConfig::default()
        };
        let loader = match ranks.peers() {
            Some(peers) => Loader::shared(training.clone(), walk, peers)?,
            None => Loader::new(training.clone(), walk)?,
        };
        let yaml = config.to_yaml()?;
        let log = ranks.first(|| {
            // The last act of opening: whatever was wrong with the new run, the old one is still there.
            if !options.resume && config.overwrite_output_dir {
                run.clear()?;
            }
            let metrics = MetricsLog::open(&run.path().join("metrics.jsonl"), step)?;
            let board = config.reports_to_tensorboard().then(|| Board::open(run.path(), step)).transpose()?;
            write_bytes(&run.path().join(CONFIG), yaml.as_bytes())?;
            if let (Some(texts), None) = (&texts, &last) {
                texts.save(run.path())?;
            }
            Ok((metrics, board))
        })?;
        let (metrics, board) = log.unzip();
        let rank_metrics = if config.log_on_each_rank {
            ranks.agree(Ok(()))?; // rank 0 has cleared what was there
            Some(MetricsLog::open(&run.path().join(RankMetrics::file_name(ranks.rank())), step)?)
        } else {
            None
        };
        Ok(Self {
            saver: Saver::new(run.clone()),
            share: None,
            ranks,
            gradients,
            student,
            anchor,
            optimizer,
            ema,
            loss_scale: config.fp16.then(|| state.as_ref().and_then(|state| state.loss_scale).unwrap_or_default()),
            schedule,
            training,
            source_sha256,
            loader,
            held_out,
            metrics,
            rank_metrics,
            board: board.flatten(),
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
    ///
    /// # Errors
    /// As [`Trainer::train_step`], and where a file of the run cannot be written.
    pub fn train(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        let outcome = self.run(progress);
        self.ranks.told(outcome)
    }

    fn run(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        if self.step == 0 {
            vq::train(&self.student, &self.config, &*self.training, &self.stop, progress)?;
            self.ranks.copy_first(&self.student.made().iter().map(|(_, t)| t.shallow_clone()).collect::<Vec<_>>())?;
        }
        progress.begin(self.step, self.schedule.max_steps);
        if self.step > 0 {
            // The evaluation that followed the checkpoint, if one did, was cut from the log with it.
            self.evaluate_if_due(progress)?;
        }
        let mut saved_at = self.resumed;
        while self.step < self.schedule.max_steps && !self.is_stopped()? {
            let metrics = self.train_step()?;
            progress.step(&metrics);
            self.look_after_save(progress)?;
            let due = self.config.save_strategy == Strategy::Steps && self.step.is_multiple_of(self.config.save_steps);
            // Among skipped steps the weights themselves may be what is wrong: the checkpoints before are the better ones.
            let due = due && self.skipped_in_a_row == 0;
            let asked = self.save.swap(false, Ordering::Relaxed);
            if due || self.ranks.any(asked)? {
                self.begin_save(progress)?;
                saved_at = self.step;
            }
            self.evaluate_if_due(progress)?;
        }
        if self.step > saved_at {
            self.begin_save(progress)?;
        }
        self.wait_for_save(progress)?;
        if self.is_stopped()? {
            return Ok(Outcome::Stopped { step: self.step });
        }
        self.finish(progress)
    }

    /// Asks about every held-out split, seeing and blind; none where the run was told to stop meanwhile.
    ///
    /// # Errors
    /// Where held-out data cannot be read or does not fit the model.
    pub fn evaluate(&self, progress: &mut dyn Progress) -> Result<Option<EvalReport>> {
        evaluate(&self.student, &self.tokenizer, &self.held_out, &self.config, &self.ranks, &self.stop, progress)
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Everything trained, by its name on disk.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.student.parameters()
    }

    /// Writes a checkpoint and waits until it is whole; of several processes all call it.
    ///
    /// # Errors
    /// Where the checkpoint cannot be written.
    pub fn save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.begin_save(progress)?;
        let saved = self.wait_for_save(progress);
        self.ranks.agree(saved)
    }

    /// What is left to do once the last step is done and saved.
    fn finish(&mut self, progress: &mut dyn Progress) -> Result<Outcome> {
        let _averaged = self.averaged();
        let shown = if self.ranks.is_first() { samples::choose(&self.held_out, SAMPLES) } else { Vec::new() };
        if self.ranks.is_first() {
            if !self.config.load_best_model_at_end {
                self.write_final()?;
            }
            self.results().save(self.run.path())?;
            let folder = self.run.path().join(vora_run::samples::FOLDER);
            samples::write(&folder, &shown, &self.student.pictures().processor)?;
            self.tell_of_records();
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
            self.ranks.first(|| self.write_final())?;
        }
        self.of_first(|this| this.tell_in_the_end(&report, &shown, progress))?;
        Ok(Outcome::Finished(report))
    }

    /// What rank 0 alone does, who may ask the model meanwhile.
    fn of_first(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.student.begin_apart();
        let done = if self.ranks.is_first() { work(self) } else { Ok(()) };
        self.student.end_apart()?;
        done
    }

    /// Scores, and what the model looks like in the end.
    fn tell_in_the_end(&mut self, report: &EvalReport, shown: &[Shown], progress: &mut dyn Progress) -> Result<()> {
        if !report.0.is_empty() {
            report.save(&self.run.path().join("eval.json"))?;
        }
        self.show(shown)?;
        self.plot()?;
        match self.language() {
            Ok(Some(language)) => {
                progress.compared(&language);
                language.save(self.run.path())?;
            }
            Ok(None) => {}
            // The model is there; a template that takes no question without a picture is no reason to lose the run.
            Err(error) => tracing::warn!("what seeing cost in text was not measured: {error:#}"),
        }
        Ok(())
    }

    fn write_final(&self) -> Result<()> {
        self.run.save_folder(FINAL, |folder| snapshot::Snapshot::of(&self.student)?.write(folder)).map(|_| ())
    }

    fn tell_of_records(&self) {
        let too_long = match self.loader.num_too_long() {
            0 => String::new(),
            long => format!(", {long} of them as not even their first answer fits into max_seq_len"),
        };
        if self.loader.num_skipped() > 0 {
            tracing::warn!("{} bad records were left out{too_long}", self.loader.num_skipped());
        }
        if self.truncated > 0 {
            tracing::warn!("{} samples lost turns at their end, to fit into max_seq_len", self.truncated);
        }
    }

    /// What the adapters cost in text where they act on everything; none where there are no adapters, for then the LLM is
    /// either untouched or nothing of what it was is left here.
    fn language(&self) -> Result<Option<Language>> {
        if self.student.model.lora().is_none() {
            return Ok(None);
        }
        let (llm, preparation) = (self.student.model.llm(), self.student.preparation(&self.config)?);
        let found = language(Side::frozen(llm), Side::whole(llm), &preparation.tokenizer, &preparation.chat);
        found.map(Some)
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
            self.of_first(|this| {
                this.show(&samples::choose(&this.held_out, SAMPLES))?;
                this.plot()
            })?;
        }
        Ok(())
    }

    fn log(&mut self, report: &EvalReport, progress: &mut dyn Progress) -> Result<()> {
        let metrics = EvalMetrics { step: self.step, eval: report.clone() };
        progress.evaluated(&metrics);
        if let Some(board) = &mut self.board {
            board.eval(&metrics)?;
        }
        self.write(&Line::Eval(metrics))
    }

    pub(super) fn write(&mut self, line: &Line) -> Result<()> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(line))
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
            board.samples(self.step, shown, &answers, &self.student.pictures().processor)?;
            if let Some(maps) = &maps {
                board.block_maps(self.step, maps)?;
            }
        }
        Ok(())
    }

    pub(super) fn plot(&self) -> Result<()> {
        let path = self.run.path();
        let title = match &self.config.run_name {
            Some(name) => name.clone(),
            None => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        plot::draw(&path.join("loss.svg"), &title, &MetricsLog::read(&path.join("metrics.jsonl"))?)
    }

    /// Whether any of the processes was told to stop.
    fn is_stopped(&self) -> Result<bool> {
        self.ranks.any(self.stop.load(Ordering::Relaxed))
    }
}
