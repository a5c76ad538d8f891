//! Processes that train together.

use super::*;

pub(super) const RANK_KILLED: Row = Row {
    test: "a_rank_killed",
    fault: "one of several processes is killed",
    happens: "the others stop within 30 s and name it; started again, the run goes on from the last checkpoint",
    exit: 1,
    lost: 2 * INTERVAL,
};
pub(super) const RANK_FROZEN: Row = Row {
    test: "a_rank_frozen",
    fault: "one of several processes is frozen (SIGSTOP)",
    happens: "as one that is killed, found by its silence of 15 s",
    exit: 1,
    lost: 2 * INTERVAL,
};
pub(super) const TWO_GROUPS: Row = Row {
    test: "two_groups",
    fault: "processes that train together, on a run folder that another trainer has",
    happens: "all of them refuse and name the process of the first, which goes on",
    exit: 1,
    lost: 0,
};

/// Two processes, each with half of the batch; the recipe's is 2.
const TWO: [&str; 2] = ["--nproc", "2"];
const HALF: &str = "per_device_train_batch_size=1";

fn launch(run: &Run, more: &[&str]) -> Child {
    let mut command = run.train(&[&[HALF], more].concat());
    command.args(TWO).env("OMP_NUM_THREADS", "1").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A process of a rank that `launcher` started.
fn rank_of(launcher: &Child, rank: usize) -> u32 {
    let mut found = None;
    wait(|| {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let mut ids = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
        found = ids.find(|id| {
            let read = |file: &str| std::fs::read(format!("/proc/{id}/{file}")).unwrap_or_default();
            let stat = text(&read("stat"));
            let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
            let variable = format!("RANK={rank}");
            parent == Some(launcher.id()) && read("environ").split(|byte| *byte == 0).any(|v| v == variable.as_bytes())
        });
        found.is_some()
    });
    found.unwrap()
}

fn is_there(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// Step, loss and norm of the gradient.
fn losses(run: &Run) -> Vec<(u64, f64, f64)> {
    let lines = MetricsLog::read(&run.path().join("metrics.jsonl")).unwrap().into_iter();
    let step = |line| if let Line::Step(s) = line { Some((s.step, s.loss, s.grad_norm)) } else { None };
    lines.filter_map(step).collect()
}

/// Rank 1 gets a signal in the midst of a run: the others stop in time and name it, and the run goes on to the same losses.
fn goes_on_after(name: &str, row: &Row, set: &[&str], parts: &[&str]) {
    let set = [&["bf16=false"], set].concat();
    let run = Run::with(&set);
    let long = "max_steps=100000";
    let launcher = launch(&run, &[long]);
    run.wait_for_step(5);
    let ranks = [0, 1].map(|rank| rank_of(&launcher, rank));
    let sent = Command::new("kill").args(["-s", name, &ranks[1].to_string()]).status().unwrap();
    assert!(sent.success());
    let start = Instant::now();
    wait(|| !is_there(ranks[0]));
    assert!(start.elapsed() < Duration::from_secs(30), "rank 0 stopped after {:?}", start.elapsed());
    left(row, &launcher.wait_with_output().unwrap(), parts);
    assert!(!is_there(ranks[1]), "rank 1 was left behind");
    lost(row, run.step(), run.saved());
    let steps = format!("max_steps={}", run.saved() + 4);
    succeeded(&launch(&run, &[&steps]).wait_with_output().unwrap());
    let whole = Run::with(&set);
    succeeded(&launch(&whole, &[&steps]).wait_with_output().unwrap());
    assert_eq!(losses(&run), losses(&whole)); // digit for digit
    assert!(trained(&whole.path()) == trained(&run.path()), "the resumed run ended with other weights");
}

#[test]
fn a_rank_killed() {
    let said = ["rank 1 has not been heard of for 5 s", "was killed by signal 9"];
    let shared = ["zero_stage=3", "gradient_checkpointing=true"]; // where a block waits for its weights
    goes_on_after("KILL", &RANK_KILLED, &shared, &said);
}

#[test]
fn a_rank_frozen() {
    goes_on_after("STOP", &RANK_FROZEN, &[], &["rank 1 has not been heard of for 15 s"]);
}

#[test]
fn two_groups() {
    let run = Run::new();
    let first = run.spawn(&["max_steps=100000"]);
    run.wait_for_step(1);
    let process = format!("in use by another trainer (process {})", first.id());
    let refused = launch(&run, &[]).wait_with_output().unwrap();
    left(&TWO_GROUPS, &refused, &[&process, "rank 1: error: rank 0: the run folder"]);
    let step = run.step();
    run.wait_for_step(step + 1);
    signal(&first, "TERM");
    left(&SIGTERM, &first.wait_with_output().unwrap(), &[]);
}

#[test]
fn processes_stop_together_and_go_on() {
    let run = Run::new();
    let launcher = launch(&run, &["max_steps=100000", "save_steps=100000"]);
    run.wait_for_step(2);
    signal(&launcher, "USR1");
    wait(|| run.saved() > 0);
    signal(&launcher, "TERM");
    left(&SIGTERM, &launcher.wait_with_output().unwrap(), &["stopped after step"]);
    assert_eq!(run.step(), run.saved());
    // One process goes on with what two have saved.
    succeeded(&run.output(&[&format!("max_steps={}", run.saved() + 1), "per_device_train_batch_size=2"]));
}

/// Settings of a process, and variables of its environment.
type Given<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)]);

/// Each process by itself, with the environment that is given and what else it sets; what each said.
fn by_hand(run: &Run, ranks: [Given<'_>; 2], without: &str) -> [Output; 2] {
    let port = fixtures::free_port();
    let spawn = |(rank, (more, variables)): (usize, Given<'_>)| {
        let mut command = run.train(&[&[HALF, "ddp_timeout=8"], more].concat());
        command.envs(fixtures::environment(rank, 2, port)).envs(variables.iter().copied()).env_remove(without);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut children = ranks.into_iter().enumerate().map(spawn).collect::<Vec<_>>().into_iter();
    std::array::from_fn(|_| children.next().unwrap().wait_with_output().unwrap())
}

#[track_caller]
fn both_say(outputs: &[Output; 2], parts: [&str; 2]) {
    for (output, part) in outputs.iter().zip(parts) {
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let line = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(line.contains(part), "`{part}` is missing in: {said}");
        assert_eq!(said.matches("error: ").count(), 1, "{said}");
    }
}

#[test]
fn processes_that_do_not_fit_each_other_are_told() {
    let run = Run::new();
    // Another run file.
    let other = by_hand(&run, [(&[], &[]), (&["learning_rate=3", "seed=5"], &[])], "");
    let differs = "the run file of rank 1 is another than that of rank 0: ";
    both_say(&other, [&format!("rank 1: {differs}"), differs]);
    assert!(text(&other[1].stderr).contains("learning_rate was") && text(&other[1].stderr).contains("is 3"));
    // No MASTER_ADDR.
    let missing = "RANK, WORLD_SIZE, MASTER_PORT are set, but not MASTER_ADDR";
    both_say(&by_hand(&run, [(&[], &[]), (&[], &[])], "MASTER_ADDR"), [missing, missing]);
    // A port that somebody else listens at.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let taken: &[(&str, &str)] = &[("MASTER_PORT", &port)];
    let in_use = by_hand(&run, [(&[], taken), (&[], taken)], "");
    both_say(&in_use, [&format!("port {port} is in use on this machine"), "no store answers at 127.0.0.1"]);
    // GPUs where there are none.
    let nccl: &[&str] = &["ddp_backend=nccl"];
    let told = "ddp_backend is nccl, which sends tensors between GPUs, and this run is on Cpu: gloo serves there";
    both_say(&by_hand(&run, [(nccl, &[("VORA_DEVICE", "cpu")]), (nccl, &[("VORA_DEVICE", "cpu")])], ""), [told, told]);
    // One that never comes.
    let alone = by_hand(&run, [(&[], &[]), (&[], &[("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "9")])], "");
    both_say(&alone, ["1 of 2 processes came within 8 s, ddp_timeout; missing: rank 1", "RANK is 1 and WORLD_SIZE 1"]);
}

#[test]
fn a_group_of_one_learns_what_a_process_alone_learns() {
    let found = [&[][..], &["ddp_backend=gloo"], &["ddp_backend=gloo", "zero_stage=3"]].map(|set: &[&str]| {
        let run = Run::with(&["bf16=false", "gradient_checkpointing=true"]);
        let mut command = run.train(&[set, &["max_steps=4"]].concat());
        if !set.is_empty() {
            command.envs(fixtures::environment(0, 1, fixtures::free_port()));
        }
        succeeded(&command.env("OMP_NUM_THREADS", "1").output().unwrap());
        losses(&run)
    });
    assert_eq!(found[0].len(), 4);
    assert!(found.iter().all(|losses| *losses == found[0]), "{found:?}");
}

#[test]
fn processes_that_see_other_data_are_told() {
    let run = Run::with(&["distill.center=false"]);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for (number, folder) in folders.iter().enumerate() {
        let record = |question: &str| {
            format!(
                r#"{{"frames": [], "conversations": [{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "a star"}}]}}"#
            )
        };
        let records: Vec<_> = (0..12 - number).map(|i| record(&format!("What is {i}?"))).collect();
        std::fs::write(folder.path().join("words.jsonl"), records.join("\n")).unwrap();
    }
    // The same run file, in folders of their own.
    let data = "data.train={data_fetch: {data_paths: [{anno_path: words.jsonl, image_folder: ''}]}}";
    let port = fixtures::free_port();
    let root = workspace().canonicalize().unwrap();
    for (folder, name) in folders.iter().flat_map(|folder| ["crates", "fixtures"].map(|name| (folder, name))) {
        std::os::unix::fs::symlink(root.join(name), folder.path().join(name)).unwrap();
    }
    let spawn = |rank: usize| {
        let mut command = run.train(&[data, HALF]);
        command.envs(fixtures::environment(rank, 2, port)).current_dir(folders[rank].path());
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children = [0, 1].map(spawn);
    let outputs = children.map(|child| child.wait_with_output().unwrap());
    let differs = "rank 1 sees data other than those of rank 0: 11 records with the digest";
    both_say(&outputs, [differs, differs]);
}
