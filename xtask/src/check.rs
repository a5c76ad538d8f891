//! `cargo xtask check`: what must pass before a change goes in, cheapest first.

use std::process::Stdio;

use anyhow::Result;

use crate::{cmd, setup, test};

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
}

/// Stops at the first thing that does not pass.
pub fn run(args: &Args) -> Result<()> {
    if args.tidy {
        return tidy();
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
