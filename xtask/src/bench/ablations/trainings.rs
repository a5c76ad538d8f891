//! The trainings: which there are, which are left to do, and what is made of them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use vora_run::eval::EvalReport;

use super::picture::draw;
use super::table::text;
use super::variant::{FACTORS, Levels, Variant, folder, splits};
use crate::bench::plan::Plan;
use crate::cmd::{self, ChildFailed, Vora};
use crate::train::Run;

/// What a run folder has once its training has ended.
const EVAL: &str = "eval.json";

/// Settings of all trainings: an anchor would act through every token.
const SET: [&str; 2] = ["text_anchor=null", "model.lora.answers_on=null"];

/// Seeds at most of trainings whose adapters act on image tokens alone.
const IMAGE_TOKEN_SEEDS: u64 = 3;

/// Trains whatever is not there yet, where there is a program for it, then writes `ablations.md` and `ablations.svg`.
///
/// # Errors
/// Where `out` has trainings of other settings, where one is interrupted, and after all of them where some have failed.
pub fn run(vora: Option<&Vora>, plan: &Plan) -> Result<()> {
    if vora.is_some() {
        plan.settle()?;
    }
    let trainings = trainings(plan.seeds);
    let mut variants: Vec<Variant> = Vec::new();
    for (idx, &(levels, seed)) in trainings.iter().enumerate() {
        let dir = dir(plan, levels, seed);
        if let Some(vora) = vora.filter(|_| !dir.join(EVAL).exists()) {
            eprintln!("training {} of {}: {}", idx + 1, trainings.len(), cmd::shown(&dir));
            train(vora, &training(plan, levels, seed))?;
        }
        let eval = dir.join(EVAL);
        let report = eval.exists().then(|| EvalReport::open(&eval)).transpose()?;
        match variants.last_mut().filter(|variant| variant.levels == levels) {
            Some(variant) => variant.runs.push((seed, report)),
            None => variants.push(Variant { levels, runs: vec![(seed, report)] }),
        }
    }
    let (text, path) = (text(&variants)?, plan.out.join("ablations.md"));
    println!("{text}");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    draw(&variants, &splits(&variants), &path.with_extension("svg"))?;
    println!("{} and ablations.svg beside it", cmd::shown(&path));
    let failed = trainings.iter().map(|&(levels, seed)| dir(plan, levels, seed)).filter(|dir| !dir.join(EVAL).exists());
    let failed: Vec<String> = failed.map(|dir| cmd::shown(&dir)).collect();
    ensure!(
        vora.is_none() || failed.is_empty(),
        "{} of {} trainings failed: {}",
        failed.len(),
        trainings.len(),
        failed.join(", ")
    );
    Ok(())
}

/// Trains, from the last checkpoint on where there is one. A training that fails is told of, and the others go on.
///
/// # Errors
/// Where a signal ended it.
fn train(vora: &Vora, run: &Run) -> Result<()> {
    let Err(error) = cmd::run(run.command(vora.command("train")).arg("--resume")) else { return Ok(()) };
    let code = error.downcast_ref::<ChildFailed>().map_or(1, ChildFailed::code);
    ensure!(code < 128, error.context("interrupted; the same command goes on from here"));
    eprintln!("{error:#}");
    Ok(())
}

/// Every training, variant by variant.
fn trainings(seeds: u64) -> Vec<(Levels, u64)> {
    let levels = (0..8).map(|bits| [bits & 1, bits >> 1 & 1, bits >> 2]);
    let seeds = |levels: Levels| if levels[2] == 1 { seeds.min(IMAGE_TOKEN_SEEDS) } else { seeds };
    levels.flat_map(|levels| (0..seeds(levels)).map(move |seed| (levels, seed))).collect()
}

fn dir(plan: &Plan, levels: Levels, seed: u64) -> PathBuf {
    plan.out.join(folder(levels)).join(format!("seed-{seed}"))
}

fn training(plan: &Plan, levels: Levels, seed: u64) -> Run {
    let of_levels: Vec<&str> =
        levels.iter().zip(FACTORS).filter_map(|(&level, factor)| factor.values[level].set).collect();
    plan.training(&SET, &of_levels, seed, &dir(plan, levels, seed))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// A program that trains at once: bidirectional attention is worth 0.2, distillation 0.1, a seed 0.01. It notes what it
    /// was called with, and fails on what the file `fails` names.
    const PROGRAM: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
score=50
distilled=10
for word; do
  case $word in
    output_dir=*) dir=${word#output_dir=} ;;
    seed=*) score=$((score + ${word#seed=})) ;;
    model.vision_attention=bidirectional) score=$((score + 20)) ;;
    distill.weight=0) distilled=0 ;;
  esac
done
case $dir in *$(cat "$here/fails")) exit $(cat "$here/code") ;; esac
mkdir -p "$dir"
echo "{\"test\":{\"all\":{\"n\":100,\"exact_match\":0.$((score + distilled)),\"blind_exact_match\":0.1}}}" > "$dir/eval.json"
"#;

    struct Fake {
        folder: tempfile::TempDir,
        plan: Plan,
    }

    impl Fake {
        fn new(seeds: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            // Written by a child: a file that this process had open for writing could not be run while a test beside this one
            // starts a child of its own.
            let mut write = Command::new("sh");
            write.args(["-c", "printf %s \"$1\" > \"$2\"", "sh", PROGRAM]).arg(path("vora"));
            assert!(write.status().unwrap().success());
            fs::set_permissions(path("vora"), fs::Permissions::from_mode(0o755)).unwrap();
            fs::write(path("run.yaml"), "max_steps: 1\n").unwrap();
            let base = Run { config: path("run.yaml"), set: vec!["max_steps=7".to_owned()], device: None };
            let plan = Plan { base, seeds, out: path("out") };
            let fake = Self { folder, plan };
            fake.fails_on("nothing", 0);
            fake
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn fails_on(&self, ending: &str, code: u8) {
            fs::write(self.path("fails"), ending).unwrap();
            fs::write(self.path("code"), code.to_string()).unwrap();
        }

        fn run(&self) -> Result<()> {
            run(Some(&Vora { program: self.path("vora") }), &self.plan)
        }

        fn calls(&self) -> Vec<String> {
            let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
            calls.lines().map(str::to_owned).collect()
        }
    }

    fn cells(text: &str) -> Vec<Vec<String>> {
        let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
        text.lines().filter(|line| line.starts_with('|')).map(cells).collect()
    }

    fn row<'a>(rows: &'a [Vec<String>], begins: &[&str]) -> &'a [String] {
        let row = rows.iter().find(|row| row.iter().zip(begins).all(|(cell, begin)| cell == begin));
        &row.unwrap_or_else(|| panic!("no {begins:?} in {rows:?}"))[begins.len()..]
    }

    #[test]
    fn every_variant_is_trained_once_and_paired_by_seed() {
        let fake = Fake::new(5);
        fake.run().unwrap();
        let calls = fake.calls();
        assert_eq!(calls.len(), 4 * 5 + 4 * 3);
        let mut settings: Vec<_> = calls.iter().map(|call| call.split("output_dir=").next().unwrap()).collect();
        settings.sort_unstable();
        settings.dedup();
        assert_eq!(settings.len(), calls.len(), "no two trainings are the same");
        for call in &calls {
            let begin = format!("train --config {} --set text_anchor=null", fake.path("run.yaml").display());
            assert!(
                call.starts_with(&begin) && call.contains("--set max_steps=7") && call.ends_with("--resume"),
                "{call}"
            );
        }
        let text = fs::read_to_string(fake.plan.out.join("ablations.md")).unwrap();
        let rows = cells(&text);
        // 0.8 to 0.84: t = 2.776, deviation 0.01581.
        let mean = row(&rows, &["bidirectional", "distilled", "all tokens"]);
        assert_eq!(mean, ["5", "0.820 (0.800 to 0.840)"]);
        assert_eq!(row(&rows, &["causal", "not distilled", "image tokens"])[0], "3");
        let of_attention = row(&rows, &["bidirectional over causal", "distilled, all tokens"]);
        assert_eq!(of_attention, ["5", "+0.200 (+0.200 to +0.200)"]);
        let of_distillation = row(&rows, &["distilled over not distilled", "causal, image tokens"]);
        assert_eq!(of_distillation, ["3", "+0.100 (+0.100 to +0.100)"]);
        let of_tokens = row(&rows, &["image tokens over all tokens", "causal, distilled"]);
        assert_eq!(of_tokens, ["3", "+0.000 (+0.000 to +0.000)"]);
        let svg = fs::read_to_string(fake.plan.out.join("ablations.svg")).unwrap();
        assert_eq!(svg.matches("<circle").count(), calls.len());
        assert!(svg.contains("bidirectional, distilled, all tokens") && svg.contains("exact match"));
        fake.run().unwrap();
        assert_eq!(fake.calls().len(), calls.len(), "what is finished is not trained again");
    }

    #[test]
    fn what_failed_is_told_and_what_was_interrupted_goes_on() {
        let fake = Fake::new(2);
        fake.fails_on("causal-distilled-all_tokens/seed-1", 1);
        let error = fake.run().unwrap_err().to_string();
        let failed = fake.plan.out.join("causal-distilled-all_tokens/seed-1").display().to_string();
        assert_eq!(error, format!("1 of 16 trainings failed: {failed}"));
        let text = fs::read_to_string(fake.plan.out.join("ablations.md")).unwrap();
        assert_eq!(row(&cells(&text), &["causal", "distilled", "all tokens"]), ["1 of 2", "0.600"]);
        let of_attention = ["bidirectional over causal", "distilled, all tokens"];
        assert_eq!(row(&cells(&text), &of_attention), ["1", "+0.200"], "pairs are of one seed");

        fake.fails_on("causal-distilled-all_tokens/seed-1", 130);
        let error = fake.run().unwrap_err();
        assert!(format!("{error:#}").starts_with("interrupted; the same command goes on from here"), "{error:#}");
        assert_eq!(error.downcast_ref::<ChildFailed>().unwrap().code(), 130);
        fake.fails_on("nothing", 0);
        fake.run().unwrap();
        assert_eq!(fake.calls().len(), 16 + 1 + 1);
    }

    #[test]
    fn other_settings_need_another_folder_and_more_seeds_do_not() {
        let mut fake = Fake::new(1);
        let nothing = run(None, &fake.plan).unwrap_err().to_string();
        assert!(nothing.starts_with("no training has ended"), "{nothing}");
        fake.run().unwrap();
        fake.plan.seeds = 2;
        fake.run().unwrap();
        assert_eq!(fake.calls().len(), 16);
        fake.plan.base.set = vec!["max_steps=8".to_owned()];
        run(None, &fake.plan).unwrap(); // nothing is trained, so nothing is mixed
        let error = fake.run().unwrap_err().to_string();
        assert!(error.contains("other settings, as its settings.yaml says: choose another --dir"), "{error}");
        assert!(Path::new(&fake.plan.out).join("settings.yaml").exists());
    }
}
