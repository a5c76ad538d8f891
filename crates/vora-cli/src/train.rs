//! `vora train`: runs a run file, with a progress bar on a terminal and plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tch::Device;
use vora_recipe::{DdpBackend, TrainConfig};
use vora_run::language::Language;
use vora_run::metrics::{EvalMetrics, StepMetrics};
use vora_torch::dist::{Nccl, ProcessGroup, World};
use vora_torch::runtime;
use vora_train::Plan;
use vora_train::{Options, Outcome, Progress, Silent, Trainer};

/// Train a model that sees, a VoRA, a LLaVA, a Chameleon or a Gemma 4 Unified, as a run file says.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora train --config crates/vora-train/recipes/scenes.yaml
  vora train --config crates/vora-train/recipes/scenes-llava.yaml
  vora train --config crates/vora-train/recipes/gemma4.yaml --set model.llm=GEMMA4 --set data.train.data_fetch.data_paths.0.anno_path=FILE
  vora train --config run.yaml --set model.lora.r=64 --set max_steps=2000 --set output_dir=runs/r64
  vora train --config run.yaml --resume
  vora train --config run.yaml --plan
  vora train --config run.yaml --nproc 8
  torchrun --no-python --nnodes 2 --nproc-per-node 8 --rdzv-endpoint node0:29400 vora train --config run.yaml

A run folder holds config.yaml, metrics.jsonl, loss.svg, eval.json, checkpoints/ and final/.
SIGINT and SIGTERM save a checkpoint and stop; --resume goes on from it, bit for bit. A second SIGINT stops at once.
SIGUSR1 saves a checkpoint and goes on.
Started by torchrun, or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT otherwise set, it trains with the others.")]
pub(crate) struct Args {
    /// The run file
    #[arg(long)]
    config: PathBuf,
    /// Set one key of the run file, dotted: model.lora.r=64
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the run folder's last checkpoint
    #[arg(long)]
    resume: bool,
    /// Tell what the run will take, parameters, memory and time a step, and train nothing: some steps are made to
    /// measure, and nothing is written to the run folder. Folders of models that lack their weights will do, but for a Chameleon's
    #[arg(long, conflicts_with = "resume")]
    plan: bool,
    /// With --plan: what 2, 4, 8, .. up to so many processes would send each other a step, the bandwidth that takes, and
    /// the memory of each
    #[arg(long, value_name = "N", requires = "plan")]
    world_size: Option<u64>,
    /// With --plan: as JSON
    #[arg(long, requires = "plan")]
    json: bool,
    /// Train in so many processes on this machine, each with a GPU of its own where there are some; each takes
    /// per_device_train_batch_size samples at once
    #[arg(long, value_name = "N", conflicts_with = "plan")]
    nproc: Option<usize>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", env = "VORA_DEVICE")]
    device: String,
}

/// The signal that came, 0 for none.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    #[cfg(unix)]
    if let Some(nproc) = args.nproc.filter(|nproc| *nproc != 1) {
        return crate::ranks::launch(nproc);
    }
    let config = TrainConfig::open(&args.config, &args.set)?;
    let world = if args.plan { None } else { World::from_env()? };
    let device = runtime::device(&of_rank(&args.device, world.as_ref()))?;
    // Until all have met, a signal ends the process at once.
    let timeout = Duration::from_secs(config.ddp_timeout);
    let are_several = |world: &World| world.world_size > 1 || config.ddp_backend.is_some();
    let group = world.filter(are_several).map(|world| ProcessGroup::join(&world, timeout)).transpose()?;
    if let Some(group) = &group {
        connect(group, config.ddp_backend, device)?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let save = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&save))?;
    // Before the handler that sets the flag: the first SIGINT finds it unset, the second one leaves at once.
    let interrupted = 128 + signal_hook::consts::SIGINT;
    signal_hook::flag::register_conditional_shutdown(signal_hook::consts::SIGINT, interrupted, Arc::clone(&stop))?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let flag = Arc::clone(&stop);
        // SAFETY: the handler only stores to atomics.
        unsafe {
            signal_hook::low_level::register(signal, move || {
                SIGNAL.store(signal, Ordering::Relaxed);
                flag.store(true, Ordering::Relaxed);
            })?;
        }
    }
    let folder = config.output_dir.clone();
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        runtime::set_threads(computing(runtime::threads(), config.dataloader_num_workers));
    }
    let mut options = Options::new(device, &vora_hub::resolve);
    (options.resume, options.stop, options.save) = (args.resume, stop, save);
    options.group = group.clone();
    if args.plan {
        let plan = Plan::measure(&config, options)?;
        let plan = match args.world_size {
            Some(world_size) => plan.with_processes(world_size),
            None => plan,
        };
        let text = if args.json { serde_json::to_string_pretty(&plan)? } else { plan.to_string() };
        writeln!(std::io::stdout().lock(), "{text}")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut trainer = Trainer::new(config, options)?;
    let is_first = group.as_ref().is_none_or(|group| group.rank() == 0);
    if !is_first {
        return Ok(match trainer.train(&mut Silent)? {
            Outcome::Finished(_) => ExitCode::SUCCESS,
            Outcome::Stopped { .. } => stopped(),
        });
    }
    let mut terminal = Terminal::new();
    let trained: usize = trainer.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    let processes = group.as_ref().map_or(String::new(), |group| format!(" in {} processes", group.world_size()));
    terminal.say(&format!(
        "training {:.2}M parameters on {device:?}{processes}, run folder {}",
        trained as f64 / 1e6,
        folder.display()
    ));
    let outcome = trainer.train(&mut terminal)?;
    terminal.bar.finish_and_clear();

    let mut out = std::io::stdout().lock();
    match outcome {
        Outcome::Finished(report) => {
            if !report.0.is_empty() {
                writeln!(out, "{report}")?;
            }
            writeln!(out, "done; everything lies in {}", folder.display())?;
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped { step } => {
            terminal.say(&format!("stopped after step {step}; `--resume` goes on from there"));
            Ok(stopped())
        }
    }
}

/// The exit code after a signal; one that another process got counts as this one's.
fn stopped() -> ExitCode {
    let signal = match SIGNAL.load(Ordering::Relaxed) {
        0 => signal_hook::consts::SIGTERM,
        signal => signal,
    };
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))
}

/// Of the GPUs of a machine each of its processes takes one.
fn of_rank(device: &str, world: Option<&World>) -> String {
    match (device, world) {
        ("auto", Some(world)) if runtime::device("cuda").is_ok() => format!("cuda:{}", world.local_rank),
        ("cuda", Some(world)) => format!("cuda:{}", world.local_rank),
        _ => device.to_owned(),
    }
}

/// Lets GPUs send each other tensors directly, as far as is asked for and there is what it takes.
fn connect(group: &ProcessGroup, backend: Option<DdpBackend>, device: Device) -> Result<()> {
    let is_asked_for = backend == Some(DdpBackend::Nccl);
    ensure!(
        !is_asked_for || device.is_cuda(),
        "ddp_backend is nccl, which sends tensors between GPUs, and this run is on {device:?}: gloo serves there, and is \
         taken where the key is left out"
    );
    if backend == Some(DdpBackend::Gloo) || !device.is_cuda() {
        return Ok(());
    }
    match group.agree(Nccl::open()) {
        Ok(nccl) => group.attach(&nccl, device),
        Err(error) if is_asked_for => Err(error.context("ddp_backend is nccl")),
        Err(error) => {
            if group.rank() == 0 {
                tracing::warn!("tensors go between the GPUs by way of the host, over Gloo: {error:#}");
            }
            Ok(())
        }
    }
}

/// Of a processor's threads those that compute, where so many others make samples: one of these has its work done while a step
/// computes, each more gets a core; half of all are left to compute.
fn computing(threads: usize, making_samples: usize) -> usize {
    threads.saturating_sub(making_samples.saturating_sub(1)).max(threads.div_ceil(2))
}

/// A bar where there is a terminal, a line now and then where there is none.
struct Terminal {
    bar: ProgressBar,
    is_terminal: bool,
    max_steps: u64,
}

/// Steps between two lines off a terminal.
const STEPS_PER_LINE: u64 = 25;

impl Terminal {
    fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} {eta} left") {
            bar.set_style(style);
        }
        Self { bar, is_terminal, max_steps: 0 }
    }

    /// A line on stderr, above the bar.
    fn say(&self, line: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }
}

impl Progress for Terminal {
    fn tokenizer_step(&mut self, step: u64, steps: u64, reconstruction: f64) {
        let line = format!("image tokenizer: mean squared error {reconstruction:.4}");
        self.bar.set_length(steps);
        self.bar.set_position(step);
        self.bar.set_message(line.clone());
        if !self.is_terminal && (step == 1 || step.is_multiple_of(2 * STEPS_PER_LINE) || step == steps) {
            self.say(&format!("step {step}/{steps}  {line}"));
        }
    }

    fn begin(&mut self, step: u64, max_steps: u64) {
        self.max_steps = max_steps;
        self.bar.set_length(max_steps);
        self.bar.set_position(step);
        self.bar.reset_eta();
    }

    fn step(&mut self, metrics: &StepMetrics) {
        let line = losses(metrics);
        self.bar.set_position(metrics.step);
        self.bar.set_message(line.clone());
        let due = metrics.step == 1 || metrics.step.is_multiple_of(STEPS_PER_LINE) || metrics.step == self.max_steps;
        if !self.is_terminal && due {
            self.say(&format!("step {}/{}  {line}, {:.0} s", metrics.step, self.max_steps, metrics.seconds));
        }
    }

    fn evaluating(&mut self, done: usize, total: usize) {
        self.bar.set_message(format!("evaluating {done}/{total}"));
    }

    fn evaluated(&mut self, metrics: &EvalMetrics) {
        let scores: Vec<String> = metrics
            .eval
            .0
            .keys()
            .filter_map(|split| metrics.eval.all(split).map(|score| format!("{split} {:.3}", score.exact_match)))
            .collect();
        self.say(&format!("step {}  exact match: {}", metrics.step, scores.join(", ")));
    }

    fn compared(&mut self, language: &Language) {
        self.say(&format!("what seeing cost in text, adapters on: {language}"));
    }

    fn saved(&mut self, folder: &Path) {
        tracing::info!("saved {}", folder.display());
    }
}

/// The losses of a step; that of the teacher with its weight where a schedule changes it.
fn losses(metrics: &StepMetrics) -> String {
    let distill = metrics.loss_distill.map_or(String::new(), |loss| {
        let baseline = metrics.baseline_distill.map_or(String::new(), |baseline| format!(" of {baseline:.3}"));
        let weight = metrics.distill_weight.map_or(String::new(), |weight| format!("{weight:.3} x "));
        format!(" + {weight}distill {loss:.3}{baseline}")
    });
    let anchor = metrics.loss_anchor.map_or(String::new(), |loss| format!(" + anchor {loss:.3}"));
    let margin = metrics.rewards.map_or(String::new(), |rewards| format!(", margin {:.3}", rewards.margins));
    let words = if metrics.rewards.is_some() { "dpo" } else { "lm" };
    format!(
        "loss {:.3} = {words} {:.3}{distill}{anchor}{margin}, {:.1} samples/s",
        metrics.loss, metrics.loss_lm, metrics.samples_per_second
    )
}

#[cfg(test)]
mod tests {
    use super::{StepMetrics, computing, losses};

    #[test]
    fn a_weight_that_changes_stands_in_the_line() {
        let line = |more: &str| {
            let json = format!(
                r#"{{"step": 1, "loss": 2.5, "loss_lm": 2, "loss_distill": 1, "baseline_distill": 0.9, "lr": 1, "grad_norm": 1,
                "samples_per_second": 8, "tokens_per_second": 1, "data_wait": 0, "seconds": 1{more}}}"#
            );
            losses(&serde_json::from_str::<StepMetrics>(&json).unwrap())
        };
        assert_eq!(line(""), "loss 2.500 = lm 2.000 + distill 1.000 of 0.900, 8.0 samples/s");
        let scheduled = line(r#", "distill_weight": 0.5"#);
        assert_eq!(scheduled, "loss 2.500 = lm 2.000 + 0.500 x distill 1.000 of 0.900, 8.0 samples/s");
    }

    #[test]
    fn threads_that_make_samples_get_cores_from_the_second_on() {
        let cases = [((2, 1), 2), ((2, 8), 1), ((16, 0), 16), ((16, 1), 16), ((16, 5), 12), ((16, 32), 8), ((1, 3), 1)];
        for ((threads, making_samples), expected) in cases {
            assert_eq!(computing(threads, making_samples), expected, "{threads} threads, {making_samples}");
        }
    }
}
