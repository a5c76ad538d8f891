//! `cargo xtask bench memory`: what `vora train --plan` foretells, beside what the run then takes, with and without
//! activation checkpointing; every plan and every run in a process of its own.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table};
use serde_json::Value;
use vora_run::metrics::{MetricsLog, StepMetrics};
use vora_run::results::TrainResults;
use vora_run::side_by_side::steps;

use crate::cmd::{self, Vora};
use crate::setup;
use crate::train::{self, Run};

/// Steps of a run; the first, in which libtorch makes its kernels ready, does not count.
const STEPS: u32 = 12;

/// Samples in a batch: those of the recipe, and so many that activations are most of the memory.
const BATCHES: [u32; 2] = [7, 32];

/// One run, foretold and measured.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    batch: u32,
    checkpointing: bool,
    counted: f64, // bytes
    planned: Taken,
    run: Taken,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Taken {
    peak: f64, // bytes
    seconds_per_step: f64,
}

/// Plans and runs all variants of the default recipe, with `args` for `vora train`; then writes `memory.txt`.
pub fn run(out: &Path, args: &[String]) -> Result<()> {
    setup::ensure()?;
    let vora = Vora::build()?;
    let mut rows = Vec::new();
    for batch in BATCHES {
        for checkpointing in [false, true] {
            rows.push(row(&vora, out, batch, checkpointing, args)?);
        }
    }
    let table = table(&rows);
    println!("{table}");
    let path = out.join("memory.txt");
    fs::write(&path, format!("{table}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", cmd::shown(&path));
    Ok(())
}

fn row(vora: &Vora, out: &Path, batch: u32, checkpointing: bool, args: &[String]) -> Result<Row> {
    let dir = out.join(format!("batch-{batch}{}", if checkpointing { "-checkpointing" } else { "" }));
    let set = [
        format!("per_device_train_batch_size={batch}"),
        format!("gradient_checkpointing={checkpointing}"),
        format!("max_steps={STEPS}"),
        "data.eval={}".to_owned(),
        "overwrite_output_dir=true".to_owned(),
        format!("output_dir={}", dir.display()),
    ];
    let run = Run { config: cmd::root().join(train::SCENES), set: set.into(), device: Some("cpu".to_owned()) };
    run.download()?;
    let mut plan = run.command(vora.command("train"));
    plan.args(args).args(["--plan", "--json"]).stderr(Stdio::inherit());
    let output = plan.output().context("cannot run vora")?;
    ensure!(output.status.success(), "`vora train --plan` failed ({})", output.status);
    let plan: Value = serde_json::from_slice(&output.stdout).context("the plan is no JSON")?;
    cmd::run(run.command(vora.command("train")).args(args))?;
    let peak = TrainResults::open(&dir)?.peak_memory.context("train_results.json has no `peak_memory`")?;
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("{what} is missing"));
    let counted = plan["memory"].as_object().context("the plan has no `memory`")?;
    Ok(Row {
        batch,
        checkpointing,
        counted: counted.values().filter_map(Value::as_f64).sum(),
        planned: Taken {
            peak: number(&plan["measured"]["peak_memory"], "the plan's measured.peak_memory")?,
            seconds_per_step: number(&plan["measured"]["seconds_per_step"], "the plan's measured.seconds_per_step")?,
        },
        run: Taken {
            peak: peak as f64,
            seconds_per_step: seconds_per_step(&steps(MetricsLog::read(&dir.join("metrics.jsonl"))?))?,
        },
    })
}

/// The mean of all steps but the first.
fn seconds_per_step(steps: &[StepMetrics]) -> Result<f64> {
    let [first, .., last] = steps else {
        bail!("metrics.jsonl has {} steps, two at least are needed", steps.len());
    };
    Ok((last.seconds - first.seconds) / (steps.len() - 1) as f64)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "batch",
        "checkpointing",
        "counted, MiB",
        "planned peak, MiB",
        "peak of the run, MiB",
        "plan is off by",
        "planned s a step",
        "s a step of the run",
        "plan is off by",
    ]);
    let mebibytes = |bytes: f64| format!("{:.0}", bytes / f64::from(1 << 20));
    let off = |planned: f64, run: f64| format!("{:+.1} %", 100.0 * (planned / run - 1.0));
    for Row { batch, checkpointing, counted, planned, run } in rows {
        table.add_row([
            batch.to_string(),
            if *checkpointing { "yes" } else { "no" }.to_owned(),
            mebibytes(*counted),
            mebibytes(planned.peak),
            mebibytes(run.peak),
            off(planned.peak, run.peak),
            format!("{:.3}", planned.seconds_per_step),
            format!("{:.3}", run.seconds_per_step),
            off(planned.seconds_per_step, run.seconds_per_step),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_does_not_count() {
        let step = |seconds: f64| -> StepMetrics {
            serde_json::from_value(serde_json::json!({
                "step": 1, "loss": 1, "loss_lm": 1, "lr": 1, "grad_norm": 1, "samples_per_second": 1,
                "tokens_per_second": 1, "data_wait": 0, "seconds": seconds
            }))
            .unwrap()
        };
        assert_eq!(seconds_per_step(&[step(5.0), step(6.0), step(8.0)]).unwrap(), 1.5);
        assert_eq!(
            seconds_per_step(&[step(5.0)]).unwrap_err().to_string(),
            "metrics.jsonl has 1 steps, two at least are needed"
        );
    }

    #[test]
    fn the_table_tells_by_how_much_a_plan_is_off() {
        let taken = |mebibytes: u32, seconds_per_step| Taken { peak: f64::from(mebibytes << 20), seconds_per_step };
        let (planned, run) = (taken(110, 0.9), taken(100, 1.0));
        let row = Row { batch: 7, checkpointing: true, counted: f64::from(90 << 20), planned, run };
        let table = table(&[row]).to_string();
        for text in ["yes", " 90 ", "110", "100", "+10.0 %", "0.900", "-10.0 %"] {
            assert!(table.contains(text), "no `{text}` in\n{table}");
        }
    }
}
