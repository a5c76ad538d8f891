//! `cargo xtask check`: what must pass before a change goes in, cheapest first.

use std::process::Stdio;

use anyhow::Result;

use crate::{clients, cmd, examples, setup, test};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Everything but the tests
    #[arg(long)]
    cheap: bool,
    /// Tidy alone: no circles among files, crates as docs/architecture.md shows them, one path to each public item, no file
    /// or crate too long; seconds, without libtorch
    #[arg(long, conflicts_with = "cheap")]
    tidy: bool,
    /// The programs of examples/ alone: build all and run each on the tiny models, in less than a minute
    #[arg(long, conflicts_with_all = ["cheap", "tidy"])]
    examples: bool,
    /// One of them alone, in a project outside the clone, by what the README says
    #[arg(long, conflicts_with_all = ["cheap", "tidy"])]
    stranger: bool,
    /// `vora serve` alone, asked by other people's clients: the openai package, Chromium, schemathesis, lmms-eval; and the long
    /// soak. Needs a network once, for their Python environments
    #[arg(long, conflicts_with_all = ["cheap", "tidy", "examples", "stranger"])]
    clients: bool,
}

/// Stops at the first thing that does not pass.
pub fn run(args: &Args) -> Result<()> {
    if args.tidy {
        return tidy();
    }
    if args.clients {
        return clients::run();
    }
    if args.examples || args.stranger {
        if args.examples {
            examples::run_all()?;
        }
        return if args.stranger { examples::as_a_stranger() } else { Ok(()) };
    }
    setup::ensure()?;
    cmd::run(cmd::cargo().args(["fmt", "--all", "--check"]))?;
    tidy()?;
    dependency_rules()?;
    cmd::run(cmd::cargo().args("clippy --workspace --all-targets --locked -- --deny warnings".split(' ')))?;
    cmd::run(
        cmd::cargo().args("doc --workspace --no-deps --locked".split(' ')).env("RUSTDOCFLAGS", "--deny warnings"),
    )?;
    if !args.cheap {
        test::run(&test::Args::default())?;
        examples::run_all()?;
        examples::as_a_stranger()?;
    }
    eprintln!("all checks passed");
    Ok(())
}

fn tidy() -> Result<()> {
    eprintln!("tidy: {}", house::tidy::run(&cmd::root())?);
    Ok(())
}

/// Licences, duplicates and sources as `deny.toml` has them.
fn dependency_rules() -> Result<()> {
    let installed = cmd::cargo()
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !installed {
        eprintln!(
            "NOT CHECKED: dependency rules (deny.toml) need cargo-deny; `cargo install cargo-deny --locked` adds it"
        );
        return Ok(());
    }
    // Advisories need the network and change by themselves: a task of their own, `cargo deny check advisories`.
    cmd::run(cmd::cargo().args(["deny", "--locked", "check", "bans", "licenses", "sources"]))
}
