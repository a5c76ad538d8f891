//! What can befall a training run, each fault with the real program: what it says, how it exits, how many steps are
//! lost, and that the run goes on to the end that it would have had.
//!
//! `crates/vora-train/FAULTS.md` is written from the rows here: `VORA_WRITE_FAULTS=1 cargo test -p vora-cli --test it
//! faults::the_table_is_true`.

mod ranks;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use vora_run::checkpoint;
use vora_run::metrics::{EventKind, Line, MetricsLog};

use crate::{program, succeeded, text, trained, workspace};

/// Steps between two checkpoints, where a test says nothing else.
const INTERVAL: u64 = 2;

/// Steps of a run to its end.
const STEPS: u64 = 8;

/// A fault, and what the test of its name asserts.
struct Row {
    test: &'static str,
    fault: &'static str,
    happens: &'static str,
    exit: i32,
    /// At most so many steps are done again.
    lost: u64,
}

const KILLED: Row = Row {
    test: "killed",
    fault: "`kill -9` in a step, and while a checkpoint is written",
    happens: "`--resume` goes on from the last whole checkpoint; a half-written one is removed",
    exit: 128 + 9,
    lost: 2 * INTERVAL, // the interval, and the steps that were done while the next checkpoint was being written
};
const SIGTERM: Row = Row {
    test: "asked_to_end",
    fault: "SIGTERM",
    happens: "a checkpoint at the end of the step, within 10 s",
    exit: 128 + 15,
    lost: 0,
};
const SIGINT: Row = Row { test: "interrupted", fault: "SIGINT", happens: "as SIGTERM", exit: 128 + 2, lost: 0 };
const SIGINT_TWICE: Row = Row {
    test: "interrupted_twice",
    fault: "a second SIGINT",
    happens: "the program leaves at once, without a checkpoint",
    exit: 128 + 2,
    lost: INTERVAL,
};
const SIGUSR1: Row = Row {
    test: "asked_to_save",
    fault: "SIGUSR1",
    happens: "a checkpoint at the end of the step; the run goes on",
    exit: 0,
    lost: 0,
};
const FULL_DISK: Row = Row {
    test: "full_disk",
    fault: "the disk is full",
    happens: "the file is named; what was written of the checkpoint is removed, those before it stay",
    exit: 1,
    lost: 2 * INTERVAL,
};
const BAD_RECORDS: Row = Row {
    test: "bad_records",
    fault: "an image missing, truncated or outside its folder; a record without an answer; a line that is no JSON",
    happens: "each is named, counted and left out",
    exit: 0,
    lost: 0,
};
const NO_MODEL: Row = Row {
    test: "no_model",
    fault: "the teacher's or the LLM's folder is gone on resume",
    happens: "the folder is named",
    exit: 1,
    lost: 0,
};
const BIT_FLIP: Row = Row {
    test: "bit_flip",
    fault: "a flipped bit in the last checkpoint",
    happens: "the file is named with both checksums; the checkpoint before it is taken",
    exit: 0,
    lost: INTERVAL,
};
const TWO_TRAINERS: Row = Row {
    test: "two_trainers",
    fault: "a second trainer on one run folder",
    happens: "the second is refused and names the process of the first, which goes on",
    exit: 1,
    lost: 0,
};
const ANOTHER_RANK: Row = Row {
    test: "another_rank",
    fault: "resumed with another rank",
    happens: "refused, with both values",
    exit: 1,
    lost: 0,
};
const BAD_STEP: Row = Row {
    test: "bad_step",
    fault: "a loss or gradient that is not finite",
    happens: "the step is skipped and counted, no weight is changed; the log has the samples' ids",
    exit: 0,
    lost: 0,
};
const BAD_STEPS: Row = Row {
    test: "bad_steps",
    fault: "three such steps in a row",
    happens: "the run ends and names the samples; no checkpoint is written among them",
    exit: 1,
    lost: INTERVAL + 3,
};

const ROWS: [&Row; 16] = [
    &KILLED,
    &SIGTERM,
    &SIGINT,
    &SIGINT_TWICE,
    &SIGUSR1,
    &FULL_DISK,
    &BAD_RECORDS,
    &NO_MODEL,
    &BIT_FLIP,
    &TWO_TRAINERS,
    &ANOTHER_RANK,
    &BAD_STEP,
    &BAD_STEPS,
    &ranks::RANK_KILLED,
    &ranks::RANK_FROZEN,
    &ranks::TWO_GROUPS,
];

/// A run of the tiny models in a folder of its own.
struct Run {
    folder: tempfile::TempDir,
    settings: Vec<String>,
}

impl Run {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(settings: &[&str]) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The program on this run, with some more settings.
    fn train(&self, more: &[&str]) -> Command {
        self.train_in(&self.path(), program(), more)
    }

    fn train_in(&self, run: &Path, mut command: Command, more: &[&str]) -> Command {
        let quick = ["data.eval={}", "evaluation_strategy=no", "report_to=none", "distill.mean_over=2"];
        // So that a part of a run has the rates of the whole.
        let rate = "lr_scheduler_type=constant_with_warmup";
        let run = format!("output_dir={}", run.display());
        let steps = [format!("max_steps={STEPS}"), format!("save_steps={INTERVAL}")];
        command.args(["train", "--config", "crates/vora-train/recipes/smoke.yaml", "--resume"]);
        let all = quick.into_iter().chain([rate, &*run]).chain(steps.iter().map(String::as_str));
        for setting in all.chain(self.settings.iter().map(String::as_str)).chain(more.iter().copied()) {
            command.args(["--set", setting]);
        }
        command.env("VORA_DTYPE", fixtures::dtype()).current_dir(workspace());
        command.env("HF_HUB_CACHE", "no-such-cache").env_remove("RUST_LOG");
        command
    }

    fn output(&self, more: &[&str]) -> Output {
        self.train(more).output().unwrap()
    }

    fn spawn(&self, more: &[&str]) -> Child {
        self.train(more).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The last step in the log; a line that is being written does not count.
    fn step(&self) -> u64 {
        let log = std::fs::read_to_string(self.path().join("metrics.jsonl")).unwrap_or_default();
        log.split_inclusive('\n').filter(|line| line.ends_with('\n')).count() as u64
    }

    fn wait_for_step(&self, step: u64) {
        wait(|| self.step() >= step);
    }

    /// The step of the last whole checkpoint.
    fn saved(&self) -> u64 {
        checkpoint::latest(&self.path())
            .unwrap()
            .map_or(0, |folder| vora_train::TrainerState::open(&folder).unwrap().step)
    }

    /// The run goes on to its end, and ends with the weights of one that nothing befell.
    #[track_caller]
    fn goes_on(&self, more: &[&str]) {
        succeeded(&self.output(more));
        let whole = Self { folder: tempfile::tempdir().unwrap(), settings: self.settings.clone() };
        succeeded(&whole.output(more));
        assert!(trained(&whole.path()) == trained(&self.path()), "the resumed run ended with other weights");
    }
}

/// Waits until something is so: for minutes, where a loaded machine needs them.
#[track_caller]
fn wait(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_mins(5), "it did not come to be in five minutes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "SIG{name} was not sent");
}

/// The program left as the row says, and said all of `parts` without libtorch's frames.
#[track_caller]
fn left(row: &Row, output: &Output, parts: &[&str]) {
    use std::os::unix::process::ExitStatusExt;
    let said = text(&output.stderr);
    let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal));
    assert_eq!(code, Some(row.exit), "{}: {said}", row.test);
    for part in parts {
        assert!(said.contains(part), "{}: `{part}` is missing in: {said}", row.test);
    }
    assert!(!said.contains("frame #") && !said.contains("panicked"), "{said}");
}

#[track_caller]
fn lost(row: &Row, done: u64, saved: u64) {
    assert!(done <= saved + row.lost, "{}: {done} steps were done, {saved} are saved", row.test);
}

#[test]
fn killed() {
    let run = Run::with(&["max_steps=16"]);
    let half_written = || {
        let entries = std::fs::read_dir(run.path().join("checkpoints")).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).any(|name| name.starts_with(".tmp-step-"))
    };
    // In a step, then twice while a checkpoint is being written.
    for during_save in [false, true, true] {
        let from = run.saved();
        let mut child = run.spawn(&[]);
        wait(|| {
            let there = if during_save { half_written() } else { run.step() > from + INTERVAL };
            there || child.try_wait().unwrap().is_some()
        });
        child.kill().unwrap();
        left(&KILLED, &child.wait_with_output().unwrap(), &[]);
        lost(&KILLED, run.step(), run.saved());
    }
    run.goes_on(&[]);
    assert!(!half_written());
}

/// Sends a signal in the midst of a long run; its checkpoint is that of the last step.
fn stopped_by(name: &str, row: &Row) {
    let run = Run::new();
    let child = run.spawn(&["max_steps=100000", "save_steps=100000"]);
    run.wait_for_step(2);
    signal(&child, name);
    left(row, &child.wait_with_output().unwrap(), &["stopped after step", "--resume"]);
    lost(row, run.step(), run.saved());
    assert_eq!(run.step(), run.saved());
    succeeded(&run.output(&[&format!("max_steps={}", run.saved() + 1)]));
}

#[test]
fn asked_to_end() {
    stopped_by("TERM", &SIGTERM);
}

#[test]
fn interrupted() {
    stopped_by("INT", &SIGINT);
}

#[test]
fn interrupted_twice() {
    let run = Run::new();
    succeeded(&run.output(&["max_steps=2"]));
    // One step takes as long as thousands: had the second signal not ended it, that step would be saved.
    let child = run.spawn(&["gradient_accumulation_steps=5000"]);
    let is_set = |mask: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(mask)).expect("a mask of signals");
        u64::from_str_radix(line.trim(), 16).expect("hexadecimal") & (1 << (signal_hook::consts::SIGINT - 1)) != 0
    };
    wait(|| is_set("SigCgt:")); // the program handles it
    std::thread::sleep(Duration::from_millis(500)); // so that the step has begun, where the machine is quick
    signal(&child, "INT");
    wait(|| !is_set("ShdPnd:")); // it was handled
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, "INT");
    left(&SIGINT_TWICE, &child.wait_with_output().unwrap(), &[]);
    assert_eq!(run.saved(), 2);
    lost(&SIGINT_TWICE, run.step(), run.saved());
    run.goes_on(&[]);
}

#[test]
fn asked_to_save() {
    let run = Run::with(&["max_steps=30", "save_steps=100000"]);
    let child = run.spawn(&[]);
    run.wait_for_step(2);
    signal(&child, "USR1");
    wait(|| run.saved() > 0);
    let saved = run.saved();
    left(&SIGUSR1, &child.wait_with_output().unwrap(), &[]);
    assert!((2..30).contains(&saved) && run.saved() == 30, "{saved}");
    lost(&SIGUSR1, run.step(), run.saved());
}

#[test]
fn full_disk() {
    let run = Run::new();
    succeeded(&run.output(&["max_steps=4"]));
    let before = run.saved();
    let size = |folder: &Path| {
        let sizes = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        sizes.sum::<u64>()
    };
    let checkpoint = size(&run.path().join("checkpoints/step-4"));
    // A file system of its own, with room for half a checkpoint more; where none may be mounted, no file may be as
    // large as the largest of a checkpoint.
    let disk = run.folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let on_a_small_disk = "
        mount -t tmpfs tmpfs \"$DISK\" && cp -a \"$RUN\"/. \"$DISK\" || exit 99
        used=$(df -k --output=used \"$DISK\" | tail -1)
        mount -o remount,size=$((used + ROOM))k \"$DISK\" || exit 99
        \"$@\"; code=$?
        rm -r \"$RUN\" && cp -a \"$DISK\" \"$RUN\" || exit 98
        exit $code";
    let with = |mut shell: Command, script: &str, folder: &Path| {
        shell.args(["sh", "-c", script, "sh", env!("CARGO_BIN_EXE_vora")]);
        shell.env("DISK", &disk).env("RUN", run.path()).env("ROOM", (checkpoint / 2048).to_string());
        run.train_in(folder, shell, &[]).output()
    };
    let mut unshare = Command::new("unshare");
    unshare.arg("-rm");
    let mounted = with(unshare, on_a_small_disk, &disk).ok().filter(|output| output.status.code() != Some(99));
    let (output, reason) = match mounted.filter(|output| !text(&output.stderr).contains("unshare failed")) {
        Some(output) => (output, "No space left on device"),
        None => {
            let script = "trap '' XFSZ; ulimit -f 16; exec \"$@\"";
            (with(Command::new("env"), script, &run.path()).unwrap(), "File too large")
        }
    };
    left(&FULL_DISK, &output, &["cannot write", reason]);
    assert_eq!(run.saved(), before);
    lost(&FULL_DISK, run.step(), run.saved());
    run.goes_on(&[]);
}

/// Annotations of one record a line, beside a good picture `a.png` and a truncated one `cut.png`.
fn annotations(folder: &Path, records: &[&str]) -> String {
    let picture = std::fs::read(workspace().join("fixtures/images/rgb.png")).unwrap();
    std::fs::write(folder.join("cut.png"), &picture[..picture.len() / 2]).unwrap();
    std::fs::write(folder.join("a.png"), picture).unwrap();
    let path = folder.join("records.jsonl");
    std::fs::write(&path, records.join("\n")).unwrap();
    format!(
        "data={{train: {{data_fetch: {{data_paths: [{{anno_path: '{}', image_folder: '{}'}}]}}}}}}",
        path.display(),
        folder.display()
    )
}

fn record(id: &str, frame: &str) -> String {
    let (frames, place) =
        if frame.is_empty() { (String::new(), "") } else { (format!(r#""frames": ["{frame}"], "#), "<image>") };
    format!(
        r#"{{"id": "{id}", {frames}"conversations": [{{"from": "human", "value": "{place}What is it?"}}, {{"from": "gpt", "value": "a star"}}]}}"#
    )
}

#[test]
fn bad_records() {
    let data = tempfile::tempdir().unwrap();
    let [good, cut, gone, outside] =
        [("good", "a.png"), ("cut", "cut.png"), ("gone", "gone.png"), ("outside", "../a.png")]
            .map(|(id, frame)| record(id, frame));
    let unanswered = r#"{"id": "unanswered", "conversations": [{"from": "human", "value": "What is it?"}]}"#;
    let data = annotations(data.path(), &[&good, &cut, &gone, &outside, unanswered, "{no json"]);
    let run = Run::with(&[&data, "max_steps=2", "shuffle=false", "distill.center=false"]);
    let parts = ["cut.png", "gone.png", "../a.png", "has no answer", "records.jsonl:6", "bad records were left out"];
    left(&BAD_RECORDS, &run.output(&[]), &parts);
    lost(&BAD_RECORDS, run.step(), run.saved());
}

#[test]
fn no_model() {
    let models = tempfile::tempdir().unwrap();
    for name in ["llm", "dinov2"] {
        let (from, to) = (workspace().join("fixtures/tiny").join(name), models.path().join(name));
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    let at = |key: &str, name: &str| format!("model.{key}={}", models.path().join(name).display());
    let run = Run::with(&[&at("llm", "llm"), &at("aux_vision", "dinov2")]);
    succeeded(&run.output(&["max_steps=2"]));
    for name in ["llm", "dinov2"] {
        let (here, away) = (models.path().join(name), models.path().join("away"));
        std::fs::rename(&here, &away).unwrap();
        left(&NO_MODEL, &run.output(&[]), &["error: ", &here.display().to_string()]);
        std::fs::rename(&away, &here).unwrap();
        lost(&NO_MODEL, run.step(), run.saved());
    }
    run.goes_on(&[]);
}

#[test]
fn bit_flip() {
    let run = Run::new();
    succeeded(&run.output(&["max_steps=4"]));
    let file = run.path().join("checkpoints/step-4/optimizer.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    lost(&BIT_FLIP, 4, run.saved());
    assert_eq!(run.saved(), 2);
    let output = run.output(&["max_steps=5"]);
    left(&BIT_FLIP, &output, &["passed over", "checksum mismatch", "optimizer.safetensors"]);
    run.goes_on(&["max_steps=5"]);
}

#[test]
fn two_trainers() {
    let run = Run::new();
    let first = run.spawn(&["max_steps=100000"]);
    run.wait_for_step(1);
    let process = format!("in use by another trainer (process {})", first.id());
    left(&TWO_TRAINERS, &run.output(&[]), &[&process]);
    let step = run.step();
    run.wait_for_step(step + 1);
    signal(&first, "TERM");
    left(&SIGTERM, &first.wait_with_output().unwrap(), &[]);
    lost(&TWO_TRAINERS, run.step(), run.saved());
}

#[test]
fn another_rank() {
    let run = Run::new();
    succeeded(&run.output(&["max_steps=2"]));
    left(&ANOTHER_RANK, &run.output(&["model.lora.r=8"]), &["cannot resume from", "model.lora.r was 4, is 8"]);
    lost(&ANOTHER_RANK, run.step(), run.saved());
    run.goes_on(&[]);
}

#[test]
fn bad_step() {
    // The weight of the teacher's loss makes the gradient infinite wherever there is a picture to be taught about.
    let data = tempfile::tempdir().unwrap();
    let records = [("words-1", ""), ("picture", "a.png"), ("words-2", "")].map(|(id, frame)| record(id, frame));
    let data = annotations(data.path(), &records.each_ref().map(String::as_str));
    let one = ["per_device_train_batch_size=1", "gradient_accumulation_steps=1", "shuffle=false"];
    let run = Run::with(&[&data, one[0], one[1], one[2], "distill={weight: 3e38, mean_over: 2}"]);
    left(&BAD_STEP, &run.output(&[]), &["skipped: step 2 is not finite", "picture"]);
    let lines = MetricsLog::read(&run.path().join("metrics.jsonl")).unwrap();
    let mut skipped = Vec::new();
    let mut taken = Vec::new();
    for line in lines {
        match line {
            Line::Event(event) if event.event == EventKind::SkippedStep => skipped.push((event.step, event.samples)),
            Line::Step(step) => taken.push((step.step, step.skipped_steps)),
            _ => {}
        }
    }
    assert_eq!(skipped, [2, 5, 8].map(|step| (step, vec!["picture".to_owned()])));
    assert_eq!(taken, [(1, 0), (3, 1), (4, 1), (6, 2), (7, 2)]);
    lost(&BAD_STEP, STEPS, run.saved());
}

#[test]
fn bad_steps() {
    let run = Run::new();
    succeeded(&run.output(&["max_steps=4"]));
    let output = run.output(&["learning_rate=1e30"]);
    left(&BAD_STEPS, &output, &["error: 3 steps in a row were skipped", "is not finite", "train-"]);
    assert_eq!(run.saved(), 4);
    lost(&BAD_STEPS, run.step(), run.saved());
    run.goes_on(&[]);
}

#[test]
fn the_table_is_true() {
    let mut table = String::from(
        "# Faults\n\nWhat can befall a training run. Each row is a test with the real program, in \
         [`faults.rs`](../vora-cli/tests/it/faults.rs)\nand beside it, which also wrote this table; after each, the run goes on from \
         its last whole checkpoint. \"Lost\" are the steps that are done\nagain, at most; ",
    );
    table +=
        "checkpoints are written beside the training, so that a kill can cost those made while one was written.\n\n";
    table += "| fault | what happens | exit code | lost | test |\n| --- | --- | --- | --- | --- |\n";
    for Row { test, fault, happens, exit, lost } in ROWS {
        let tests = concat!(include_str!("faults.rs"), include_str!("faults/ranks.rs"));
        assert!(tests.contains(&format!("#[test]\nfn {test}()")), "there is no test `{test}`");
        let lost = match lost {
            0 => "none".to_owned(),
            _ => format!("{lost}, at a checkpoint every {INTERVAL}"),
        };
        table += &format!("| {fault} | {happens} | {exit} | {lost} | `{test}` |\n");
    }
    let path = workspace().join("crates/vora-train/FAULTS.md");
    if std::env::var_os("VORA_WRITE_FAULTS").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap();
    assert!(found == table, "{} is not what the rows say", path.display());
}
