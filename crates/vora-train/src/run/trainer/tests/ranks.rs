//! Several processes against one with the same batch.

use std::collections::BTreeMap;

use fixtures::Ranks;
use vora_run::metrics::RankMetrics;
use vora_torch::dist::{ProcessGroup, World};

use super::super::resume::optimizer_state;
use super::*;

/// Where the processes of a test find its folder.
const FOLDER: &str = "VORA_TEST_FOLDER";

/// Steps that are compared.
const STEPS: u64 = 10;

/// A run, by a name and what it sets in debug.yaml.
struct Case {
    name: &'static str,
    settings: Vec<String>,
    micro_batch: usize,   // of all processes
    skipped: Option<u64>, // a step that is not finite in one process
}

fn cases(folder: &Path) -> Vec<Case> {
    let case = |name: &'static str, settings: &[&str]| {
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        Case { name, settings, micro_batch: 4, skipped: None }
    };
    let packed = "data.train.data_preprocess={max_seq_len: 230}";
    let data = format!("data.train={{data_fetch: {{{}}}}}", annotations(folder));
    let shared = ["zero_stage=3", "gradient_checkpointing=true"];
    let shuffled = case("files, one picture of which is gone", &[&data, "distill.center=false"]);
    vec![
        case("plain", &[]),
        case("accumulated", &["gradient_accumulation_steps=2"]),
        case("packed", &["data.train.packing=true", packed, "gradient_accumulation_steps=2"]),
        case("recomputed", &["gradient_checkpointing=true", "gradient_accumulation_steps=2"]),
        case("averaged", &["ema_decay=0.9"]),
        Case { skipped: Some(3), ..case("not finite", &["ema_decay=0.9"]) },
        case("anchored", &["text_anchor={texts: 5, tokens: 24, max_length: 12, weight: 0.5}"]),
        case("grouped", &[&data, "data.train.group_by_modality=true", "distill.center=false"]),
        shuffled,
        case("preferred", &["loss=dpo", "distill={}"]),
        case("whole states", &["zero_stage=0"]),
        case("all weights", &["model.lora=null", "model.freeze_llm=false", "learning_rate=1e-3"]),
        case(
            "all weights, recomputed",
            &["model.lora=null", "model.freeze_llm=false", "learning_rate=1e-3", "gradient_checkpointing=true"],
        ),
        case("llava", &[OTHER_SYSTEMS[1], "learning_rates={}", "distill={}"]),
        case("shared", &[shared[0], shared[1], "gradient_accumulation_steps=2"]),
        case(
            "shared, anchored",
            &[shared[0], shared[1], "text_anchor={texts: 5, tokens: 24, max_length: 12, weight: 0.5}"],
        ),
        case("shared, preferred", &[shared[0], shared[1], "loss=dpo", "distill={}"]),
        case("shared, llava", &[shared[0], shared[1], OTHER_SYSTEMS[1], "learning_rates={}", "distill={}"]),
        case("shared, files", &[shared[0], shared[1], &data, "distill.center=false"]),
        Case { skipped: Some(3), ..case("shared, not finite", &shared) },
    ]
}

/// The losses, the norm and the counts of each step, and the weights with their averages at the end.
type Found = (Vec<[f64; 5]>, Vec<(String, Tensor)>);

fn train(case: &Case, folder: &Path, group: Option<std::sync::Arc<ProcessGroup>>) -> Found {
    let (rank, world_size) = group.as_ref().map_or((0, 1), |group| (group.rank(), group.world_size()));
    let mut settings = case.settings.clone();
    settings.push(format!("per_device_train_batch_size={}", case.micro_batch / world_size));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let folder = folder.join(format!("{}-{world_size}", case.name));
    let options = Options { group: group.clone(), ..Options::new(Device::Cpu, &resolve) };
    let mut trainer = Trainer::new(config("debug.yaml", &folder, &settings), options).unwrap();
    let before = group.as_ref().map(|group| group.traffic());
    let mut steps = Vec::new();
    for step in 1..=STEPS {
        let (_, first) = trainer.parameters().swap_remove(0);
        let whole = first.detach().copy();
        if case.skipped == Some(step) && rank + 1 == world_size {
            let _ = tch::no_grad(|| first.shallow_clone().fill_(f64::NAN));
        }
        let found = trainer.train_step().unwrap();
        if case.skipped == Some(step) {
            tch::no_grad(|| first.shallow_clone().copy_(&whole));
            assert!(found.loss.is_nan() && found.skipped_steps == 1, "{}: {found:?}", case.name);
            continue;
        }
        let losses = [found.loss_lm, found.loss_distill.unwrap_or(0.0), found.loss_anchor.unwrap_or(0.0)];
        let rewards = found.rewards.map_or(0.0, |rewards| rewards.margins);
        steps.push([losses[0], losses[1], losses[2], found.grad_norm, rewards]);
    }
    if let (Some(group), Some(before)) = (&group, before) {
        // Gradients once a step, whatever its passes, and changed weights once where the state is sharded.
        let (sent, bytes) =
            (group.traffic(), trainer.parameters().iter().map(|(_, t)| 4 * t.numel() as u64).sum::<u64>());
        let changed = if trainer.config.zero_stage == 0 { 0 } else { steps.len() as u64 };
        assert_eq!(sent.gradients - before.gradients, STEPS * bytes, "{}", case.name);
        assert_eq!(sent.broadcast - before.broadcast, changed * bytes, "{}", case.name);
        let weights = shared_bytes(&trainer);
        assert_eq!(weights > 0, trainer.config.zero_stage == 3, "{}", case.name);
        if case.name == "shared" {
            // Each micro-batch gathers all, forward and back; records' sizes and errors are words beside that.
            let (gathered, passes) = (sent.all_gather - before.all_gather, 2 * 2 * STEPS);
            assert!(
                (passes * weights..passes * weights + (1 << 16)).contains(&gathered),
                "{gathered}, {passes} x {weights}"
            );
        }
    }
    let ema = trainer.ema.iter().flat_map(|ema| ema.state()).map(|(name, t)| (format!("average {name}"), t));
    let all = trainer.parameters().into_iter().chain(ema).map(|(name, t)| (name, t.detach().copy())).collect();
    (steps, all)
}

/// Bytes of the weights that the processes share, each rounded up to equal shares.
fn shared_bytes(trainer: &Trainer) -> u64 {
    let (llm, mut bytes) = (trainer.student.model.llm(), 0);
    let visit = &mut |_: &str, linear: &vora_lora::Linear| {
        bytes += linear.sharded().map_or(0, |weight| weight.num_bytes() * trainer.ranks.world_size() as u64);
        Ok(())
    };
    llm.linears(visit).unwrap();
    bytes
}

/// As a rank of a test: every case, compared with what one process found, and the weights with the other ranks'.
fn compare_as_a_rank() {
    let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
    let group = ProcessGroup::join(&World::from_env().unwrap().unwrap(), std::time::Duration::from_secs(300)).unwrap();
    let alone: BTreeMap<String, Vec<[f64; 5]>> =
        serde_json::from_slice(&std::fs::read(folder.join("alone.json")).unwrap()).unwrap();
    let mut all = BTreeMap::new();
    for case in cases(&folder) {
        let (steps, weights) = train(&case, &folder, Some(group.clone()));
        all.insert(case.name, steps.clone());
        let expected = &alone[case.name];
        assert_eq!(steps.len(), expected.len());
        for (step, (found, expected)) in steps.iter().zip(expected).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                let difference = (found - expected).abs();
                assert!(difference < 1e-5, "{}, step {}: {found} against {expected}", case.name, step + 1);
            }
        }
        for (name, tensor) in weights.iter().filter(|(_, tensor)| tensor.kind() == Kind::Float) {
            let all = group.all_gather(&tensor.contiguous()).unwrap();
            let same = (1..group.world_size() as i64).all(|rank| all.get(rank).equal(&all.get(0)));
            assert!(same, "{}: {name} is not the same in all processes", case.name);
        }
    }
    // Weights that are gathered are those that were shared out: digit for digit.
    assert_eq!(all["shared"], all["recomputed"]);
}

fn alone_and(test: &str, world_sizes: &[usize]) {
    if Ranks::is_one() {
        return compare_as_a_rank();
    }
    let folder = tempfile::tempdir().unwrap();
    let found = cases(folder.path()).into_iter().map(|case| (case.name, train(&case, folder.path(), None).0));
    let found: BTreeMap<_, _> = found.collect();
    std::fs::write(folder.path().join("alone.json"), serde_json::to_vec(&found).unwrap()).unwrap();
    for &world_size in world_sizes {
        let variables = [(FOLDER, folder.path().to_str().unwrap())];
        let test = format!("run::trainer::tests::ranks::{test}");
        Ranks::of(&test, 0..world_size, world_size, &variables).pass();
    }
}

#[test]
fn two_processes_and_four_make_the_steps_of_one() {
    alone_and("two_processes_and_four_make_the_steps_of_one", &[2, 4]);
}

/// What the run of the tests below sets.
const WHOLE: [&str; 5] = [
    "max_steps=8",
    "ema_decay=0.9",
    "save_steps=4",
    "text_anchor={texts: 5, tokens: 24, max_length: 12}",
    "report_to=none",
];

/// A run in `folder`, to its end or to a step, from its last checkpoint where there is one.
fn go_on(folder: &Path, stop: u64, group: Option<std::sync::Arc<ProcessGroup>>) -> Outcome {
    let (rank, world_size) = group.as_ref().map_or((0, 1), |group| (group.rank(), group.world_size()));
    let batch_size = format!("per_device_train_batch_size={}", 4 / world_size);
    let settings = [&WHOLE[..], &[&batch_size]].concat();
    let options = Options { group, resume: true, ..Options::new(Device::Cpu, &resolve) };
    let mut trainer = Trainer::new(config("debug.yaml", folder, &settings), options).unwrap();
    // One of the processes is told to stop: all do.
    let flag = if rank + 1 == world_size { trainer.stop.clone() } else { Arc::default() };
    trainer.train(&mut StopAfter(stop, flag)).unwrap()
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() {
    const STOP: &str = "VORA_TEST_STOP";
    const NEVER: u64 = 99;
    if Ranks::is_one() {
        let group =
            ProcessGroup::join(&World::from_env().unwrap().unwrap(), std::time::Duration::from_secs(300)).unwrap();
        let stop = std::env::var(STOP).unwrap().parse().unwrap();
        let outcome = go_on(Path::new(&std::env::var(FOLDER).unwrap()), stop, Some(group));
        assert_eq!(matches!(outcome, Outcome::Stopped { .. }), stop < NEVER);
        return;
    }
    let ranks = |world_size: usize, folder: &Path, stop: &str| {
        let variables = [(FOLDER, folder.to_str().unwrap()), (STOP, stop)];
        let test = "run::trainer::tests::ranks::a_run_goes_on_with_another_number_of_processes";
        Ranks::of(test, 0..world_size, world_size, &variables).pass();
    };
    let folders = tempfile::tempdir().unwrap();
    let at = |name: &str| folders.path().join(name);
    let saved = |name: &str| optimizer_state(&at(name).join("checkpoints/step-8")).unwrap();
    go_on(&at("alone"), NEVER, None);
    ranks(2, &at("two"), &NEVER.to_string());
    // 2 -> 2, 2 -> 1, 1 -> 2, 2 -> 4.
    for (name, first, second) in [("2-2", 2, 2), ("2-1", 2, 1), ("1-2", 1, 2), ("2-4", 2, 4)] {
        for (world_size, stop) in [(first, 3), (second, NEVER)] {
            match world_size {
                1 => drop(go_on(&at(name), stop, None)),
                _ => ranks(world_size, &at(name), &stop.to_string()),
            }
        }
        let (expected, found) = (losses(&at("alone")), losses(&at(name)));
        assert_eq!(found.len(), 8);
        for (expected, found) in expected.iter().zip(&found) {
            let distill = expected.2.unwrap() - found.2.unwrap();
            assert!((expected.1 - found.1).abs() < 1e-5 && distill.abs() < 1e-5, "{name}: {expected:?} {found:?}");
        }
        let names = std::fs::read_dir(at(name).join("checkpoints/step-8")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let shares = names.filter(|name| name.starts_with("optimizer-")).count();
        assert_eq!(shares, if second == 1 { 0 } else { second }, "{name}");
        // Together they hold what one process writes.
        let (alone, other) = (saved("alone"), saved(name));
        assert!(alone.names().eq(other.names()));
        for tensor in alone.names() {
            let (a, b) = (alone.tensor(tensor).unwrap(), other.tensor(tensor).unwrap());
            let difference = (&a - &b).abs().max().double_value(&[]);
            assert!(difference <= 1e-3 * a.abs().max().double_value(&[]).max(1e-6), "{name}, {tensor}: {difference}");
        }
    }
    assert_eq!(losses(&at("two")), losses(&at("2-2"))); // digit for digit
    let (two, again) = (saved("two"), saved("2-2"));
    assert!(two.names().all(|name| two.tensor(name).unwrap().equal(&again.tensor(name).unwrap())));
}

#[test]
fn whole_runs_end_as_those_of_one_process() {
    let models = ["zero_stage=1", OTHER_SYSTEMS[3], "zero_stage=3"];
    let run = |model: &str, folder: &Path, group: Option<std::sync::Arc<ProcessGroup>>| {
        let batch_size = format!("per_device_train_batch_size={}", if group.is_some() { 1 } else { 2 });
        let recomputed = format!("gradient_checkpointing={}", model == "zero_stage=3");
        let settings = [model, &batch_size, &recomputed, "bf16=false", "max_steps=4", "eval_steps=2", "report_to=none"];
        let settings = [&settings[..], &["log_on_each_rank=true"]].concat();
        let options = Options { group, ..Options::new(Device::Cpu, &resolve) };
        let mut trainer = Trainer::new(config("smoke.yaml", folder, &settings), options).unwrap();
        assert!(matches!(trainer.train(&mut Silent).unwrap(), Outcome::Finished(_)));
    };
    if Ranks::is_one() {
        let group =
            ProcessGroup::join(&World::from_env().unwrap().unwrap(), std::time::Duration::from_secs(300)).unwrap();
        let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
        for (number, model) in models.into_iter().enumerate() {
            run(model, &folder.join(format!("two-{number}")), Some(group.clone()));
        }
        return;
    }
    let folders = tempfile::tempdir().unwrap();
    let variables = [(FOLDER, folders.path().to_str().unwrap())];
    Ranks::of("run::trainer::tests::ranks::whole_runs_end_as_those_of_one_process", 0..2, 2, &variables).pass();
    for (number, model) in models.into_iter().enumerate() {
        let (one, two) = (folders.path().join(format!("one-{number}")), folders.path().join(format!("two-{number}")));
        run(model, &one, None);
        for (one, two) in losses(&one).iter().zip(&losses(&two)) {
            assert!(one.0 == two.0 && (one.1 - two.1).abs() < 1e-5, "{one:?} {two:?}");
        }
        // Each question once, and the same answers about the same other pictures.
        let read = |folder: &Path| std::fs::read_to_string(folder.join("eval.json")).unwrap();
        assert_eq!(read(&one), read(&two));
        let files = |folder: &Path| {
            let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            let names = names.map(|name| name.to_string_lossy().into_owned());
            names.filter(|name| !name.starts_with("metrics-rank-")).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(files(&one), files(&two));
        each_tells_of_its_own(&one, &losses(&one), 1);
        each_tells_of_its_own(&two, &losses(&two), 2);
    }
}

/// The lines of each process: the run's loss is a mean of theirs, and what they waited is a part of the step.
fn each_tells_of_its_own(folder: &Path, losses: &[(u64, f64, Option<f64>, f64)], world_size: usize) {
    let read = |rank: usize| -> Vec<RankMetrics> {
        let text = std::fs::read_to_string(folder.join(RankMetrics::file_name(rank))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let ranks: Vec<Vec<RankMetrics>> = (0..world_size).map(read).collect();
    assert!(!folder.join(RankMetrics::file_name(world_size)).exists());
    for (i, (step, loss_lm, loss_distill, _)) in losses.iter().enumerate() {
        let own: Vec<&RankMetrics> = ranks.iter().map(|lines| &lines[i]).collect();
        let (samples, between) = (own.iter().map(|line| line.samples).sum::<u64>(), |mean: f64, of: &[f64]| {
            let (least, most) = of.iter().fold((f64::MAX, f64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
            least - 1e-6 <= mean && mean <= most + 1e-6
        });
        assert_eq!(samples, 4); // two micro-batches of two
        assert!(between(*loss_lm, &own.iter().map(|line| line.loss_lm).collect::<Vec<_>>()), "{own:?}, {loss_lm}");
        if let Some(distill) = loss_distill {
            assert!(between(*distill, &own.iter().map(|line| line.loss_distill.unwrap()).collect::<Vec<_>>()));
        }
        for (rank, line) in own.iter().enumerate() {
            assert_eq!((line.step, line.rank), (*step, rank as u64));
            assert!((0.0..=line.step_time).contains(&line.wait) && (line.wait > 0.0) == (world_size > 1), "{line:?}");
            assert!(line.peak_memory >= line.memory && line.tokens > 0, "{line:?}");
        }
    }
}
