//! The picture of the crates in `docs/architecture.md`, against what cargo knows.
//!
//! The picture is the code block that begins with a line "```crates". Two headings, `without libtorch:` and `with
//! libtorch:`, part it; every other line is a crate with what it directly depends on, `vora-llm -> vora-lora,
//! vora-text`, or a crate alone. A crate may depend on those above it only; those under `without libtorch:` must not
//! reach libtorch, with their tests and build scripts, and the others must.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::fault::{Fault, Rule};
use crate::workspace::{Package, Workspace, way_to};

const FILE: &str = "docs/architecture.md";
/// The packages that link libtorch themselves.
const LIBTORCH: [&str; 2] = ["tch", "torch-sys"];

/// A line of the picture.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: usize,
    name: String,
    depends_on: BTreeSet<String>,
    libtorch: bool,
}

/// Compares the picture that lies below `root` with the workspace.
pub(super) fn check(root: &Path, workspace: &Workspace) -> Result<Vec<Fault>> {
    let text = fs::read_to_string(root.join(FILE)).with_context(|| format!("cannot read {FILE}"))?;
    let picture = match parse(&text) {
        Ok(picture) => picture,
        Err(fault) => return Ok(vec![fault]),
    };
    let mut faults = compare(&picture, workspace, root);
    let names: BTreeSet<_> = workspace.members().into_iter().map(|package| package.name.as_str()).collect();
    for line in picture.iter().filter(|line| names.contains(line.name.as_str())) {
        let way = way_to(root, &line.name, &LIBTORCH)?;
        faults.extend(beyond(line, way.as_deref()));
    }
    Ok(faults)
}

fn fault(line: usize, what: String) -> Fault {
    Fault { rule: Rule::Picture, place: format!("{FILE}:{line}"), what }
}

fn parse(text: &str) -> Result<Vec<Line>, Fault> {
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim_end()));
    let mut block = lines.skip_while(|(_, line)| *line != "```crates").peekable();
    let Some((start, _)) = block.next() else {
        return Err(fault(1, "there is no code block that begins with ```crates".into()));
    };
    let mut picture = Vec::new();
    let mut libtorch = None;
    for (number, line) in block {
        match line {
            "```" => return Ok(picture),
            "" => {}
            "without libtorch:" => libtorch = Some(false),
            "with libtorch:" => libtorch = Some(true),
            _ => {
                let (name, right) = line.split_once(" -> ").unwrap_or((line, ""));
                let depends_on = right.split(", ").filter(|name| !name.is_empty()).map(str::to_owned).collect();
                let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
                let Some(libtorch) = libtorch.filter(|_| is_name(name)) else {
                    return Err(fault(
                        number,
                        format!("`{line}` is not read: write `crate -> crate, crate` below a heading"),
                    ));
                };
                picture.push(Line { number, name: name.to_owned(), depends_on, libtorch });
            }
        }
    }
    Err(fault(start, "the code block does not end".into()))
}

/// Whether the picture shows the package: the crates, xtask and what it stands on; `benches` and `fixtures` only serve tests.
fn is_shown(package: &Package, root: &Path) -> bool {
    let folder = package.manifest_path.parent();
    folder.is_some_and(|folder| {
        folder.parent() == Some(&root.join("crates")) || ["house", "xtask"].iter().any(|name| folder == root.join(name))
    })
}

fn compare(picture: &[Line], workspace: &Workspace, root: &Path) -> Vec<Fault> {
    let packages: Vec<_> = workspace.members().into_iter().filter(|package| is_shown(package, root)).collect();
    let mut faults = Vec::new();
    for package in &packages {
        if !picture.iter().any(|line| line.name == package.name) {
            faults.push(fault(1, format!("`{}` is missing in the picture", package.name)));
        }
    }
    let mut above = BTreeSet::new();
    for line in picture {
        let Line { number, name, depends_on, .. } = line;
        for upward in depends_on.difference(&above) {
            faults.push(fault(*number, format!("`{name}` -> `{upward}` points upward: `{upward}` must stand above")));
        }
        if !above.insert(name.clone()) {
            faults.push(fault(*number, format!("`{name}` stands there twice")));
        }
        let Some(package) = packages.iter().find(|package| package.name == *name) else {
            faults.push(fault(*number, format!("there is no crate `{name}` in the workspace")));
            continue;
        };
        let real = workspace.direct(package);
        for more in real.difference(depends_on) {
            faults.push(fault(*number, format!("`{name}` depends on `{more}`, which the picture does not show")));
        }
        for less in depends_on.difference(&real) {
            faults.push(fault(*number, format!("`{name}` does not depend on `{less}`, as the picture shows")));
        }
    }
    faults
}

/// What is wrong with the heading that a crate stands under, whose build comes to libtorch by `way`.
fn beyond(line: &Line, way: Option<&[String]>) -> Option<Fault> {
    let Line { number, name, libtorch, .. } = line;
    match way {
        Some(way) if !libtorch => {
            Some(fault(*number, format!("`{name}` stands without libtorch, but {}", way.join(" -> "))))
        }
        None if *libtorch => Some(fault(*number, format!("`{name}` stands with libtorch, but does not link it"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::here;

    const PICTURE: &str = "
# Architecture

```text
not this
```

```crates
without libtorch:
gguf
text -> gguf

with libtorch:
torch -> gguf
llm -> text, torch
```
";

    fn faults(picture: &str, workspace: &[&str]) -> Vec<String> {
        let picture = parse(picture).unwrap();
        let faults = compare(&picture, &Workspace::of(workspace), Path::new("/house"));
        faults.into_iter().map(|fault| format!("{}  {}", fault.place.replace(FILE, ""), fault.what)).collect()
    }

    #[test]
    fn a_true_picture_has_no_faults() {
        let workspace = ["gguf", "text -> gguf", "torch -> gguf", "llm -> torch, text, dev:gguf"];
        assert_eq!(faults(PICTURE, &workspace), [""; 0]);
    }

    #[test]
    fn every_difference_is_told() {
        let found = faults(PICTURE, &["gguf", "text", "torch -> gguf, text", "image"]);
        let expected = [
            ":1  `image` is missing in the picture",
            ":11  `text` does not depend on `gguf`, as the picture shows",
            ":14  `torch` depends on `text`, which the picture does not show",
            ":15  there is no crate `llm` in the workspace",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn arrows_point_to_what_stands_above() {
        let picture = PICTURE.replace("text -> gguf", "text -> gguf, torch");
        let found = faults(&picture, &["gguf", "text -> gguf, torch", "torch -> gguf", "llm -> torch, text"]);
        assert_eq!(found, [":11  `text` -> `torch` points upward: `torch` must stand above"]);
    }

    #[test]
    fn a_crate_stands_under_the_right_heading() {
        let picture = parse(PICTURE).unwrap();
        let found = |way: &[&str]| -> Vec<String> {
            let way: Vec<String> = way.iter().map(|name| (*name).to_owned()).collect();
            let way = (!way.is_empty()).then_some(&way[..]);
            picture.iter().filter_map(|line| beyond(line, way)).map(|fault| fault.what).collect()
        };
        let without = found(&["text", "fixtures", "tch"]);
        assert_eq!(without[1..], ["`text` stands without libtorch, but text -> fixtures -> tch"]);
        assert_eq!(found(&[])[0], "`torch` stands with libtorch, but does not link it");
        assert_eq!((without.len(), found(&[]).len()), (2, 2));
    }

    #[test]
    fn a_picture_that_cannot_be_read_is_a_fault() {
        let place = |text: &str| parse(text).unwrap_err().place;
        assert_eq!(place("no picture"), format!("{FILE}:1"));
        assert_eq!(place("```crates\nwith libtorch:\na -> b"), format!("{FILE}:1"));
        assert_eq!(place("```crates\na -> b\n```"), format!("{FILE}:2"));
        assert_eq!(place("```crates\nwith libtorch:\na b\n```"), format!("{FILE}:3"));
    }

    #[test]
    fn the_picture_in_docs_is_true() {
        let faults = check(&here(), &Workspace::read(&here()).unwrap()).unwrap();
        assert!(faults.is_empty(), "{}", super::super::fault::report(&faults));
    }
}
