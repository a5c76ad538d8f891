//! `cargo xtask compare`: asks the reference libraries and the program the same seeded questions at every border.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use crate::{cmd, fixtures};

const EXAMPLES: &str = "\
Examples:
  cargo xtask compare                                       500 cases of every border
  cargo xtask compare --border tars --seed 3                500 others of one
  cargo xtask compare --border tars --seed 3 --case 17      one of them, made small where it differs
  cargo xtask compare --program old/target/release/vora     another build of the program
  cargo xtask compare --table                               write the table of fixtures/README.md

A border is a script of fixtures/compare: its first comment says what is compared with which library.";

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Borders, by the scripts of fixtures/compare without `.py`; all of them by default
    #[arg(long = "border", value_name = "NAME")]
    borders: Vec<String>,
    /// Cases of each border
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    cases: u64,
    /// Of the random inputs; each case is drawn from it and its own number
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the case of this number
    #[arg(long, requires = "borders")]
    case: Option<u64>,
    /// The program that is asked; else it is built
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
    /// Write what was found into fixtures/README.md
    #[arg(long, conflicts_with_all = ["borders", "case"])]
    table: bool,
}

/// What the table stands between.
const MARKS: [&str; 2] = ["<!-- borders -->\n", "<!-- end of borders -->\n"];

/// Runs the borders, one after the other.
///
/// # Errors
/// Where one found a disagreement that is no deliberate choice; the others run all the same.
pub fn run(args: &Args) -> Result<()> {
    let scripts = fixtures::scripts(&cmd::root().join("fixtures/compare"), &args.borders)?;
    let python = fixtures::python()?;
    let program = match &args.program {
        Some(program) => std::path::absolute(program).with_context(|| format!("no path: {}", program.display()))?,
        None => cmd::Vora::build()?.program,
    };
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut found = Vec::new();
    for script in &scripts {
        let summary = folder.path().join("summary.json");
        let mut border = Command::new(&python);
        border.arg(script).arg("--program").arg(&program).arg("--summary").arg(&summary).current_dir(cmd::root());
        border.args(["--cases", &args.cases.to_string(), "--seed", &args.seed.to_string()]);
        border.args(args.case.map(|case| ["--case".to_owned(), case.to_string()]).into_iter().flatten());
        let ended = cmd::run(&mut border);
        // It fails where something differs, too: then it says what.
        match fs::read(&summary) {
            Ok(text) => found.push(Border::read(&text).with_context(|| format!("what {} found", script.display()))?),
            Err(_) => return ended.and_then(|()| bail!("{} wrote nothing of what it found", script.display())),
        }
        fs::remove_file(&summary).context("cannot remove a summary")?;
    }
    let table = table(&found);
    println!("{table}");
    if args.table {
        write(&table, &cmd::root().join("fixtures/README.md"))?;
    }
    let disagreements: u64 = found.iter().map(|border| border.disagreements).sum();
    if disagreements > 0 {
        bail!("{disagreements} cases differ from the references");
    }
    Ok(())
}

/// What a border's script found.
#[derive(Debug)]
struct Border {
    name: String,
    reference: String,
    cases: u64,
    disagreements: u64,
    deliberate: u64,
}

impl Border {
    fn read(summary: &[u8]) -> Result<Self> {
        let summary: Value = serde_json::from_slice(summary)?;
        let text = |key: &str| summary[key].as_str().map(str::to_owned).with_context(|| format!("it has no `{key}`"));
        let number = |key: &str| summary[key].as_u64().with_context(|| format!("it has no `{key}`"));
        let deliberate = summary["deliberate"].as_object().context("it has no `deliberate`")?;
        Ok(Self {
            name: text("border")?,
            reference: text("reference")?,
            cases: number("cases")?,
            disagreements: number("disagreements")?,
            deliberate: deliberate.values().filter_map(Value::as_u64).sum(),
        })
    }
}

fn table(found: &[Border]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["border", "reference", "cases", "disagreements", "deliberate"]);
    for Border { name, reference, cases, disagreements, deliberate } in found {
        let numbers = [cases, disagreements, deliberate].map(u64::to_string);
        table.add_row([name.clone(), reference.clone()].into_iter().chain(numbers));
    }
    for column in 2..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn write(table: &Table, readme: &Path) -> Result<()> {
    let text = fs::read_to_string(readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let text =
        fixtures::table::between_marks(&text, MARKS, table).with_context(|| format!("in {}", readme.display()))?;
    fs::write(readme, text).with_context(|| format!("cannot write {}", readme.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_becomes_a_row() {
        let summary = br#"{"border": "tars", "reference": "`webdataset`", "cases": 500, "disagreements": 2,
            "deliberate": {"a": 3, "b": 1}, "kinds": {}, "seconds": 9}"#;
        let table = table(&[Border::read(summary).unwrap()]).to_string();
        let row: Vec<_> = table.lines().last().unwrap().split('|').map(str::trim).collect();
        assert_eq!(row[1..6], ["tars", "`webdataset`", "500", "2", "4"]);
        let error = Border::read(b"{}").unwrap_err().to_string();
        assert_eq!(error, "it has no `deliberate`");
    }
}
