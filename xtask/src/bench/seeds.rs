//! `cargo xtask bench seeds`: the default recipe with several seeds, each asked more questions than a run asks itself, and what
//! seeing cost in text, adapters apart and merged. What is there already is not made again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use vora_run::eval::{EvalReport, Score};
use vora_run::interval::Interval;
use vora_run::language::Language;
use vora_run::results::TrainResults;

use super::plan::Plan;
use crate::cmd::{self, Vora};

/// Five hundred questions at least of each type, and 300 descriptions of each number of objects. Most objects have a colour
/// with a name here, so that it can be asked.
const ASKED: [&str; 9] = [
    "data.eval.test.samples=940",
    "data.eval.test.unnamed_share=0.2",
    "data.eval.test.kinds={colour: 4, shape: 2, where: 2, how_many: 1, yes_no: 2}",
    "data.eval.unseen.samples=780",
    "data.eval.unseen.unnamed_share=0.2",
    "data.eval.unseen.kinds={colour: 4, shape: 2, where: 2, how_many: 1, yes_no: 2}",
    "data.eval.describe_1.samples=300",
    "data.eval.describe_2.samples=300",
    "data.eval.describe_3.samples=300",
];

/// The two folders that a training is answered from, and where in the run folder what each keeps of its language is written.
/// What the run itself writes is measured with the adapters on, whatever a prompt holds.
const ANSWERING: [(&str, &str); 2] = [("final", "language/apart"), ("merged", "language/merged")];

/// Trains, merges and measures whatever is not there yet, where there is a program for it; then writes `seeds.md`.
///
/// # Errors
/// Where `out` has trainings of other settings, and where a training, a merge or a measurement fails; the same command goes on
/// from there.
pub fn run(vora: Option<&Vora>, plan: &Plan) -> Result<()> {
    let dirs: Vec<PathBuf> = (0..plan.seeds).map(|seed| plan.out.join(format!("seed-{seed}"))).collect();
    if let Some(vora) = vora {
        plan.settle()?;
        for (seed, dir) in dirs.iter().enumerate() {
            complete(plan, vora, seed as u64, dir)?;
        }
    }
    let seeds = dirs.iter().map(|dir| Seed::read(dir)).collect::<Result<Vec<_>>>()?;
    let (text, path) = (text(&seeds), plan.out.join("seeds.md"));
    println!("{text}");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", cmd::shown(&path));
    Ok(())
}

/// Makes of one seed what is not there yet.
fn complete(plan: &Plan, vora: &Vora, seed: u64, dir: &Path) -> Result<()> {
    if !dir.join("eval.json").exists() {
        let run = plan.training(&ASKED, &[], seed, dir);
        cmd::run(run.command(vora.command("train")).arg("--resume"))?;
    }
    let (last, merged) = (dir.join("final"), dir.join("merged"));
    if !merged.exists() {
        cmd::run(vora.command("merge").arg(last).arg("--out").arg(&merged).args(["--as", "seeing"]))?;
    }
    for (folder, language) in ANSWERING.map(|(folder, language)| (dir.join(folder), dir.join(language))) {
        let file = language.join("language.json");
        if file.exists() {
            continue;
        }
        fs::create_dir_all(&language).with_context(|| format!("cannot make {}", language.display()))?;
        let mut eval = vora.command("eval");
        eval.arg(folder).arg("--language").arg("--out").arg(file);
        if let Some(device) = &plan.base.device {
            eval.args(["--device", device]);
        }
        cmd::run(&mut eval)?;
    }
    Ok(())
}

/// What one training came to.
#[derive(Debug)]
struct Seed {
    results: TrainResults,
    report: EvalReport,
    apart: Language,
    merged: Language,
}

impl Seed {
    fn read(dir: &Path) -> Result<Self> {
        let language = |(_, place): (&str, &str)| {
            let folder = dir.join(place);
            let found = Language::open(&folder)?;
            found.with_context(|| format!("{} has no language.json; without --plot it is made", cmd::shown(&folder)))
        };
        let [apart, merged] = ANSWERING;
        Ok(Self {
            results: TrainResults::open(dir)?,
            report: EvalReport::open(&dir.join("eval.json"))?,
            apart: language(apart)?,
            merged: language(merged)?,
        })
    }

    fn score(&self, split: &str, question_type: &str) -> Option<Score> {
        self.report.0.get(split)?.get(question_type).copied()
    }
}

/// Both tables, in Markdown.
fn text(seeds: &[Seed]) -> String {
    let machines: BTreeSet<&str> = seeds.iter().filter_map(|seed| seed.results.machine.as_deref()).collect();
    let machines = machines.into_iter().collect::<Vec<_>>().join("; ");
    format!(
        "Exact match, of descriptions the share that tell every object and no other. Worst: of the seeds, with its 95% interval \
         (Wilson). Blind: the same questions about another picture, the seeds' best.\n\n{}\n\nTraining, and what seeing cost \
         in text ({machines}).\n\n{}\n",
        answers(seeds),
        costs(seeds)
    )
}

fn answers(seeds: &[Seed]) -> Table {
    let numbers = (0..seeds.len()).map(|seed| format!("seed {seed}"));
    let header = ["split", "question type", "questions"].map(str::to_owned).into_iter().chain(numbers);
    let mut table = table(header.chain(["worst, 95%", "blind"].map(str::to_owned)));
    let asked: BTreeSet<(&str, &str)> = seeds
        .iter()
        .flat_map(|seed| &seed.report.0)
        .flat_map(|(split, scores)| scores.keys().map(move |question_type| (split.as_str(), question_type.as_str())))
        .collect();
    for (split, question_type) in asked {
        let scores: Vec<Score> = seeds.iter().filter_map(|seed| seed.score(split, question_type)).collect();
        let Some(worst) = scores.iter().min_by(|a, b| a.exact_match.total_cmp(&b.exact_match)) else { continue };
        let Interval { low, high } = worst.interval();
        let blind = scores.iter().filter_map(|score| score.blind_exact_match).max_by(f64::total_cmp);
        let row = [split.to_owned(), question_type.to_owned(), worst.n.to_string()].into_iter();
        let each = scores.iter().map(|score| format!("{:.3}", score.exact_match));
        let worst = format!("{:.3} ({low:.3} to {high:.3})", worst.exact_match);
        table.add_row(row.chain(each).chain([worst, blind.map_or("-".to_owned(), |blind| format!("{blind:.3}"))]));
    }
    table
}

fn costs(seeds: &[Seed]) -> Table {
    let numbers = (0..seeds.len()).map(|seed| format!("seed {seed}"));
    let mut table = table(std::iter::once("what".to_owned()).chain(numbers));
    let mut row = |what: &str, cell: &dyn Fn(&Seed) -> String| {
        table.add_row(std::iter::once(what.to_owned()).chain(seeds.iter().map(cell)));
    };
    row("seconds of training", &|seed| format!("{:.0}", seed.results.train_runtime));
    row("seconds a step", &|seed| format!("{:.3}", seed.results.train_steps_per_second.recip()));
    row("perplexity of prose over the LLM's, adapters apart", &|seed| format!("{:.3}", seed.apart.ratio()));
    row("the same chats as the LLM's, adapters apart", &|seed| chats(&seed.apart));
    row("perplexity of prose over the LLM's, merged", &|seed| format!("{:.3}", seed.merged.ratio()));
    row("the LLM's likeliest token in its own chats, merged", &|seed| {
        let Language { agreement, chat_tokens, .. } = seed.merged;
        format!("{agreement:.3} ({})", Interval::of_share(agreement, chat_tokens))
    });
    row("the same chats as the LLM's, merged", &|seed| chats(&seed.merged));
    table
}

fn chats(language: &Language) -> String {
    format!("{} of {}", language.same_chats, language.chats)
}

fn table(header: impl Iterator<Item = String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header.collect::<Vec<_>>());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;
    use crate::train::Run;

    /// A program that trains, merges and measures at once: every seed more makes it a tenth worse. It notes what it was called
    /// with.
    const PROGRAM: &str = r#"#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
language() {
  echo "{\"tokens\":10,\"base_perplexity\":20.0,\"perplexity\":$1,\"chat_tokens\":100,\"agreement\":0.9,\"chats\":20,\"same_chats\":$2}"
}
for word; do
  case $word in
    output_dir=*) dir=${word#output_dir=} ;;
    seed=*) seed=${word#seed=} ;;
    */merged | */language.json) made=$word ;;
  esac
done
case $1 in
  train)
    mkdir -p "$dir"
    score="{\"n\":100,\"exact_match\":0.$((9 - seed)),\"blind_exact_match\":0.$seed}"
    echo "{\"test\":{\"all\":$score,\"colour\":$score}}" > "$dir/eval.json"
    echo '{"steps":2,"train_runtime":8.0,"train_steps_per_second":0.25,"trained_parameters":1,"machine":"two cores"}' \
      > "$dir/train_results.json" ;;
  merge) mkdir -p "$made" ;;
  eval)
    case $made in
      */apart/*) language 20.0 20 > "$made" ;;
      *) language 21.0 7 > "$made" ;;
    esac ;;
esac
"#;

    #[test]
    fn every_seed_is_trained_merged_and_measured_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        // Written by a child: see the test of ablations.
        let mut write = Command::new("sh");
        write.args(["-c", "printf %s \"$1\" > \"$2\"", "sh", PROGRAM]).arg(path("vora"));
        assert!(write.status().unwrap().success());
        fs::set_permissions(path("vora"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("run.yaml"), "max_steps: 1\n").unwrap();
        let base = Run { config: path("run.yaml"), set: vec!["max_steps=2".to_owned()], device: None };
        let plan = Plan { base, seeds: 2, out: path("out") };
        let vora = Vora { program: path("vora") };
        run(Some(&vora), &plan).unwrap();

        let calls = || fs::read_to_string(path("calls")).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
        let first = calls();
        let kinds: Vec<&str> = first.iter().map(|call| call.split(' ').next().unwrap()).collect();
        assert_eq!(kinds, ["train", "merge", "eval", "eval", "train", "merge", "eval", "eval"]);
        let seed_1 = path("out/seed-1").display().to_string();
        assert!(first[4].ends_with(&format!("--set max_steps=2 --set seed=1 --set output_dir={seed_1} --resume")));
        assert!(first[4].contains("--set data.eval.describe_3.samples=300"), "{}", first[4]);
        assert_eq!(first[5], format!("merge {seed_1}/final --out {seed_1}/merged --as seeing"));
        assert_eq!(first[6], format!("eval {seed_1}/final --language --out {seed_1}/language/apart/language.json"));
        assert_eq!(first[7], format!("eval {seed_1}/merged --language --out {seed_1}/language/merged/language.json"));

        let text = fs::read_to_string(plan.out.join("seeds.md")).unwrap();
        let cells =
            |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect();
        let rows: Vec<Vec<String>> = text.lines().map(cells).collect();
        let row = |begin: &[&str]| {
            let row = rows
                .iter()
                .find(|row| row.len() > begin.len() && row.iter().zip(begin).all(|(cell, begin)| cell == begin));
            row.unwrap_or_else(|| panic!("no {begin:?} in {text}"))[begin.len()..].to_vec()
        };
        let colour = ["100", "0.900", "0.800", "0.800 (0.711 to 0.867)", "0.100"];
        assert_eq!(row(&["test", "colour"]), colour);
        assert_eq!(row(&["seconds a step"]), ["4.000", "4.000"]);
        assert_eq!(row(&["perplexity of prose over the LLM's, adapters apart"]), ["1.000", "1.000"]);
        assert_eq!(row(&["perplexity of prose over the LLM's, merged"]), ["1.050", "1.050"]);
        assert_eq!(row(&["the same chats as the LLM's, merged"]), ["7 of 20", "7 of 20"]);
        assert!(text.contains("(two cores)"));

        fs::remove_file(plan.out.join("seed-1/language/merged/language.json")).unwrap();
        let nothing = run(None, &plan).unwrap_err().to_string();
        assert!(
            nothing.ends_with("seed-1/language/merged has no language.json; without --plot it is made"),
            "{nothing}"
        );
        run(Some(&vora), &plan).unwrap();
        assert_eq!(calls().len(), first.len() + 1, "only what is missing is made");
        fs::write(path("run.yaml"), "max_steps: 3\n").unwrap();
        let other = run(Some(&vora), &plan).unwrap_err().to_string();
        assert!(other.contains("has trainings of another run file or other settings"), "{other}");
    }
}
