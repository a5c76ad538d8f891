//! `cargo xtask bench distributed`: processes that train together, under the real `torchrun`: killed and frozen ones, how far
//! two get from one, what two cost beside one, and the memory of each where they share weights. Two agents of `torchrun` on this host
//! stand for two machines.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::Value;
use vora_run::metrics::{MetricsLog, RankMetrics};
use vora_run::side_by_side::steps;

use crate::cmd::{self, Vora};
use crate::{download, fixtures, setup, train};

/// What stands behind `--`.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench distributed --")]
struct Options {
    /// Times that a process is killed, at a step drawn at random
    #[arg(long, default_value_t = 10)]
    kills: u64,
    /// Times that one is frozen
    #[arg(long, default_value_t = 1)]
    freezes: u64,
    /// Times that one is killed of two processes, each with a torchrun of its own, as on two machines; before that they train
    /// unhindered
    #[arg(long, default_value_t = 2)]
    nodes: u64,
    /// Steps of each of these runs
    #[arg(long, default_value_t = 40)]
    steps: u64,
    /// Rounds in which one process of two threads and two of one train the default recipe by turns; 0 leaves it out
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps of each of those
    #[arg(long, default_value_t = 12)]
    timed_steps: u64,
    /// Steps after which the memory of each of 1, 2 and 4 processes that share weights is compared with the plan's; 0
    /// leaves it out
    #[arg(long, default_value_t = 4)]
    memory_steps: usize,
}

const SMOKE: &str = "crates/vora-train/recipes/smoke.yaml";

/// What the runs of tiny models set.
const TINY: [&str; 8] = [
    "gradient_checkpointing=true",
    "bf16=false",
    "report_to=none",
    "data.eval={}",
    "evaluation_strategy=no",
    "save_steps=2",
    "lr_scheduler_type=constant_with_warmup",
    "overwrite_output_dir=false",
];

/// Steps after which two processes are compared with one.
const COMPARED: &str = "max_steps=50";

/// What the runs of two processes set in turn: shares of the optimizer's state, and of the weights too.
const STAGES: [&str; 2] = ["zero_stage=1", "zero_stage=3"];

/// A frozen process has to be found within that time.
const FOUND_WITHIN: Duration = Duration::from_secs(30);

/// A run is given up after that time.
const PATIENCE: Duration = Duration::from_secs(900);

/// Runs all of it and prints what was found.
pub fn run(args: &[String]) -> Result<()> {
    let options = Options::parse_from([String::new()].iter().chain(args));
    ensure!(options.steps > 8, "--steps is {}, it must be at least 9", options.steps);
    setup::ensure()?;
    let hits = options.kills + options.freezes;
    let torchrun =
        if hits + options.nodes > 0 { fixtures::python()?.with_file_name("torchrun") } else { "torchrun".into() };
    let vora = Vora::build()?;
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let max_steps = format!("max_steps={}", options.steps);
    let tiny = |run: &Path, more: &[&str]| settings(run, &[&TINY, more].concat());
    let two = |stage: usize| ["per_device_train_batch_size=1", &max_steps, STAGES[stage]];

    let mut expected = Vec::new();
    if hits + options.nodes > 0 {
        for stage in 0..STAGES.len() {
            let whole = at(&format!("whole-{stage}"));
            end(vora.command("train").args(["--nproc", "2"]).args(tiny(&whole, &two(stage))).spawn()?)?;
            expected.push(losses(&whole)?);
        }
        ensure!(expected[0] == expected[1], "{} gives other losses than {}", STAGES[1], STAGES[0]);
    }
    let mut random: u64 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.subsec_nanos().into();
    for number in 0..hits {
        let (signal, done) = if number < options.kills { ("KILL", "killed") } else { ("STOP", "frozen") };
        let (step, rank) = (2 + draw(&mut random) % (options.steps - 6), draw(&mut random) % 2);
        let (run, stage) = (at(&format!("{done}-{number}")), (number % 2) as usize);
        let stderr = fs::File::create(at("stderr"))?;
        let mut command = Command::new(&torchrun);
        command.args(["--no-python", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]);
        command.arg(&vora.program).arg("train").args(tiny(&run, &two(stage))).arg("--resume").current_dir(cmd::root());
        let started = command.env("OMP_NUM_THREADS", "1").stdout(Stdio::null()).stderr(stderr).spawn();
        let mut started = started.with_context(|| format!("cannot start {}", torchrun.display()))?;
        let reached = wait(&mut started, || losses(&run).is_ok_and(|losses| losses.len() as u64 >= step));
        reached.context("waiting for a step")?;
        let ranks = ranks(&run)?;
        let (hit, other) = (ranks[&rank], ranks[&(1 - rank)]);
        cmd::run(Command::new("kill").args(["-s", signal, &hit.to_string()]))?;
        let start = Instant::now();
        wait(&mut started, || !is_there(other))?;
        let found = start.elapsed();
        end(started)?;
        ensure!(
            losses(&run)? == expected[stage],
            "the run whose rank {rank} was {done} at step {step}, {}, ended with other losses",
            STAGES[stage]
        );
        let said = fs::read_to_string(at("stderr"))?;
        let named = ["has not been heard of", "does not answer"];
        let named = said.lines().find(|line| named.iter().any(|words| line.contains(words))).unwrap_or_default();
        println!(
            "{}, rank {rank} {done} at step {step}: the other ended after {found:.1?}; gone on to the same losses; {named}",
            STAGES[stage]
        );
        if signal == "STOP" {
            ensure!(
                found < FOUND_WITHIN && named.contains(&format!("rank {rank}")),
                "rank {rank} was not found in time: {said}"
            );
        }
    }
    let runs = if options.nodes > 0 { options.nodes + 1 } else { 0 }; // the first is left alone
    for number in 0..runs {
        let stage = (number % 2) as usize;
        let hit = (number > 0).then(|| (2 + draw(&mut random) % (options.steps - 6), draw(&mut random) % 2));
        let run = at(&format!("nodes-{number}"));
        let start = |node: &str| agent(&torchrun, &vora, &tiny(&run, &two(stage)), &at(node));
        two_nodes([start("node-0")?, start("node-1")?], &run, hit).with_context(|| {
            let said = [0, 1].map(|node| fs::read_to_string(at(&format!("node-{node}"))).unwrap_or_default());
            format!("two agents of torchrun; the first said:\n{}\nthe second:\n{}", said[0], said[1])
        })?;
        ensure!(losses(&run)? == expected[stage], "two nodes, {hit:?}, {}, end with other losses", STAGES[stage]);
        let hit = hit.map_or("unhindered".to_owned(), |(step, rank)| format!("rank {rank} killed at step {step}"));
        println!(
            "two nodes of one process each, {}, {hit}: the same losses as two processes of one node",
            STAGES[stage]
        );
    }
    far_from_one(&vora, &at("far"))?;
    if options.rounds > 0 {
        beside_one(&vora, &options, &at("beside"))?;
    }
    if options.memory_steps > 0 {
        memory(&vora, options.memory_steps, &at("memory"))?;
    }
    Ok(())
}

/// Where the agents of torchrun meet.
const ENDPOINT: &str = "127.0.0.1:29411";

/// An agent of two, with one process, which resumes where it is started again.
fn agent(torchrun: &Path, vora: &Vora, settings: &[String], stderr: &Path) -> Result<Child> {
    let mut command = Command::new(torchrun);
    command.args(["--no-python", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]);
    command.args([
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "17",
        "--rdzv-endpoint",
        ENDPOINT,
        "--local-addr",
        "127.0.0.1",
    ]);
    command.arg(&vora.program).arg("train").args(settings).arg("--resume").current_dir(cmd::root());
    command.env("OMP_NUM_THREADS", "1").env("GLOO_SOCKET_IFNAME", "lo");
    let started = command.stdout(Stdio::null()).stderr(fs::File::create(stderr)?).spawn();
    started.with_context(|| format!("cannot start {}", torchrun.display()))
}

/// Waits until both agents have ended well; on the way the process of a rank is killed once the run is at a step.
fn two_nodes(agents: [Child; 2], run: &Path, hit: Option<(u64, u64)>) -> Result<()> {
    let [mut first, mut second] = agents;
    let ended = (|| {
        if let Some((step, rank)) = hit {
            let reached = wait(&mut first, || losses(run).is_ok_and(|losses| losses.len() as u64 >= step));
            reached.context("waiting for a step")?;
            cmd::run(Command::new("kill").args(["-s", "KILL", &ranks(run)?[&rank].to_string()]))?;
        }
        for agent in [&mut first, &mut second] {
            let status = agent.wait()?;
            ensure!(status.success(), "an agent failed: {status}");
        }
        Ok(())
    })();
    for agent in [&mut first, &mut second] {
        let _ = agent.kill();
        let _ = agent.wait();
    }
    ended
}

/// What the runs set whose memory is compared: weights in f32, and few samples, so that frozen weights are most of it.
const SHARED: [&str; 11] = [
    "zero_stage=3",
    "gradient_checkpointing=true",
    "log_on_each_rank=true",
    "bf16=false",
    "per_device_train_batch_size=1",
    "text_anchor=null",
    "data.eval={}",
    "evaluation_strategy=no",
    "save_strategy=no",
    "report_to=none",
    "max_steps=100000",
];

/// A plan may be as far from what is measured.
const OFF_BY: f64 = 0.15;

/// The memory of each of some processes that share the weights of the default recipe's LLM, planned and measured.
fn memory(vora: &Vora, steps: usize, folder: &Path) -> Result<()> {
    for model in train::DEFAULT_MODELS {
        download::ensure(model)?;
    }
    let train = |run: &Path| {
        let mut train = vora.command("train");
        train.arg("--config").arg(cmd::root().join(train::SCENES)).env("OMP_NUM_THREADS", "1");
        let set = SHARED.iter().map(|setting| (*setting).to_owned());
        for setting in set.chain([format!("output_dir={}", run.display())]) {
            train.args(["--set", &setting]);
        }
        train
    };
    let planned = train(&folder.join("plan")).args(["--plan", "--world-size", "4", "--json"]).output()?;
    ensure!(planned.status.success(), "`vora train --plan` failed ({})", planned.status);
    let plan: Value = serde_json::from_slice(&planned.stdout).context("the plan is no JSON")?;
    let rows = plan["scale"]["rows"].as_array().context("the plan has no scale")?;
    for processes in [1, 2, 4] {
        let row = rows.iter().find(|row| row["world_size"] == processes && row["zero_stage"] == 3);
        let planned = row.map_or(&plan["measured"]["peak_memory"], |row| &row["memory"]);
        let planned = planned.as_f64().context("the plan has no memory")?;
        let run = folder.join(processes.to_string());
        let last = |rank: usize| -> Option<RankMetrics> {
            let text = fs::read_to_string(run.join(RankMetrics::file_name(rank))).ok()?;
            text.lines().nth(steps - 1).and_then(|line| serde_json::from_str(line).ok())
        };
        let mut started = train(&run).args(["--nproc", &processes.to_string()]).stdout(Stdio::null()).spawn()?;
        wait(&mut started, || (0..processes).all(|rank| last(rank).is_some())).context("waiting for steps")?;
        cmd::run(Command::new("kill").arg(started.id().to_string()))?;
        started.wait()?;
        let measured: Option<Vec<f64>> =
            (0..processes).map(|rank| last(rank).and_then(|line| line.peak_memory).map(|bytes| bytes as f64)).collect();
        let measured = measured.context("the system does not tell how much memory a process has")?;
        let most = measured.iter().copied().fold(0.0, f64::max);
        let off = planned / most - 1.0;
        let mebibytes = |bytes: f64| format!("{:.0} MiB", bytes / f64::from(1 << 20));
        println!(
            "zero_stage 3, {processes} processes: {} each by the plan, {} at most: {:+.1} %",
            mebibytes(planned),
            mebibytes(most),
            100.0 * off
        );
        ensure!(off.abs() < OFF_BY, "the plan is farther from that than {:.0} %", 100.0 * OFF_BY);
    }
    Ok(())
}

/// How far the losses of two processes get from those of one, and of one from itself in halves of the batch.
fn far_from_one(vora: &Vora, folder: &Path) -> Result<()> {
    let runs: [(&str, &[&str], &[&str]); 3] = [
        ("one", &["per_device_train_batch_size=4", "gradient_accumulation_steps=1"], &[]),
        ("in other sums", &["per_device_train_batch_size=2", "gradient_accumulation_steps=2"], &[]),
        ("two", &["per_device_train_batch_size=2", "gradient_accumulation_steps=1"], &["--nproc", "2"]),
    ];
    let mut found = Vec::new();
    for (name, set, more) in runs {
        let run = folder.join(name);
        let set = [&TINY, set, &[COMPARED, "learning_rate=1e-2"]].concat();
        end(vora.command("train").args(settings(&run, &set)).args(more).stdout(Stdio::null()).spawn()?)?;
        found.push(losses(&run)?);
    }
    let far = |other: &[(u64, f64, f64)]| {
        let differences = found[0].iter().zip(other).map(|(one, other)| (one.1 - other.1).abs());
        differences.fold(0.0, f64::max)
    };
    let (itself, two) = (far(&found[1]), far(&found[2]));
    println!(
        "in {} steps the loss of two processes gets {two:.1e} from that of one; one in other sums {itself:.1e}",
        found[0].len()
    );
    Ok(())
}

/// Steps a second of one process of two threads and of two of one, by turns.
fn beside_one(vora: &Vora, options: &Options, folder: &Path) -> Result<()> {
    for model in train::DEFAULT_MODELS {
        download::ensure(model)?;
    }
    let timed_steps = format!("max_steps={}", options.timed_steps);
    let mut shares = Vec::new();
    for round in 0..options.rounds {
        let mut seconds = Vec::new();
        for (name, batch, threads, more) in [("one", 8, "2", &[][..]), ("two", 4, "1", &["--nproc", "2"][..])] {
            let run = folder.join(format!("{name}-{round}"));
            let batch = format!("per_device_train_batch_size={batch}");
            let set =
                [&*timed_steps, &batch, "data.eval={}", "evaluation_strategy=no", "save_strategy=no", "report_to=none"];
            let mut train = vora.command("train");
            train.arg("--config").arg(cmd::root().join(train::SCENES)).env("OMP_NUM_THREADS", threads);
            for setting in
                set.iter().map(|setting| (*setting).to_owned()).chain([format!("output_dir={}", run.display())])
            {
                train.args(["--set", &setting]);
            }
            end(train.args(more).stdout(Stdio::null()).spawn()?)?;
            let all = steps(MetricsLog::read(&run.join("metrics.jsonl"))?);
            let all: Vec<f64> = all.iter().map(|step| step.seconds).collect();
            // The first steps make kernels ready.
            let (first, last) = (all[all.len() / 4], all[all.len() - 1]);
            seconds.push((last - first) / (all.len() - 1 - all.len() / 4) as f64);
        }
        println!("round {round}: one process {:.3} s a step, two {:.3} s", seconds[0], seconds[1]);
        shares.push(seconds[0] / seconds[1]);
    }
    shares.sort_by(f64::total_cmp);
    println!("two processes of one thread do {:.3} of the work of one of two (median)", shares[shares.len() / 2]);
    Ok(())
}

fn settings(run: &Path, set: &[&str]) -> Vec<String> {
    let all = set.iter().map(|setting| (*setting).to_owned()).chain([format!("output_dir={}", run.display())]);
    let set = all.flat_map(|setting| ["--set".to_owned(), setting]);
    ["--config".to_owned(), SMOKE.to_owned()].into_iter().chain(set).collect()
}

/// Step, loss and norm of the gradient, by the log.
fn losses(run: &Path) -> Result<Vec<(u64, f64, f64)>> {
    let steps = steps(MetricsLog::read(&run.join("metrics.jsonl"))?);
    Ok(steps.iter().map(|step| (step.step, step.loss, step.grad_norm)).collect())
}

/// The processes that train into this folder, by rank.
fn ranks(run: &Path) -> Result<BTreeMap<u64, u32>> {
    let output_dir = format!("output_dir={}", run.display());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let words = |bytes: &[u8]| -> Vec<String> {
            bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
        };
        let rank = words(&read("environ")).iter().find_map(|word| word.strip_prefix("RANK=")?.parse().ok());
        if let (Some(rank), true) = (rank, words(&read("cmdline")).contains(&output_dir)) {
            found.insert(rank, entry.file_name().to_string_lossy().parse()?);
        }
    }
    ensure!(found.len() == 2, "found {} of two processes", found.len());
    Ok(found)
}

fn is_there(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn wait(started: &mut Child, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_so() {
        if let Some(status) = started.try_wait()? {
            bail!("the run has ended: {status}");
        }
        if start.elapsed() > PATIENCE {
            started.kill()?;
            bail!("it did not come to be in {} s", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn end(mut started: Child) -> Result<()> {
    let status = started.wait()?;
    ensure!(status.success(), "a run failed: {status}");
    Ok(())
}

/// Knuth's MMIX generator.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}
