//! What a rule found: where it is, what is wrong, and the list that a person reads.

use std::fmt::Write as _;

/// The rules, in the order of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    Lost,
    Circles,
    Picture,
    Never,
    PublicPaths,
    Size,
}

impl Rule {
    const ALL: [Self; 6] = [Self::Lost, Self::Circles, Self::Picture, Self::Never, Self::PublicPaths, Self::Size];

    /// The rule, and what mends its faults.
    fn heading(self) -> (&'static str, &'static str) {
        match self {
            Self::Lost => {
                ("paths that tidy cannot follow", "write the item out where a macro makes it, or teach `resolve`")
            }
            Self::Circles => (
                "circles among files",
                "drop one arrow of each: move what both files need to the lower one, or into a file of its own",
            ),
            Self::Picture => {
                ("crates", "mend Cargo.toml, or the picture in docs/architecture.md if the design changed")
            }
            Self::Never => {
                ("arrows that must not be", "hand in what is needed as an argument, or move it to the lower room")
            }
            Self::PublicPaths => (
                "public items with two paths",
                "make the module private, or drop the `pub use`; callers take the other path",
            ),
            Self::Size => ("sizes", "look for the second noun in the file, and give it a file of its own"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug)]
pub(super) struct Fault {
    pub rule: Rule,
    /// `file:line`, or the file.
    pub place: String,
    /// What is wrong; further lines are details.
    pub what: String,
}

/// The faults by rule, each rule with what mends it.
pub(super) fn report(faults: &[Fault]) -> String {
    let mut text = String::new();
    for rule in Rule::ALL {
        let found: Vec<_> = faults.iter().filter(|fault| fault.rule == rule).collect();
        if found.is_empty() {
            continue;
        }
        let (name, mend) = rule.heading();
        let _ = writeln!(text, "\n{name}: {} ({mend})", found.len());
        for fault in found {
            let _ = writeln!(text, "  {}  {}", fault.place, fault.what.replace('\n', "\n      "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_grouped_by_rule() {
        let fault = |rule, place: &str, what: &str| Fault { rule, place: place.into(), what: what.into() };
        let text = report(&[
            fault(Rule::Size, "a.rs", "701 lines of code"),
            fault(Rule::Circles, "b.rs:3", "a -> b -> a\na -> b  b.rs:3"),
            fault(Rule::Size, "c.rs", "702 lines of code"),
        ]);
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert!(lines[0].starts_with("circles among files: 1 ("), "{text}");
        assert_eq!(lines[1..3], ["  b.rs:3  a -> b -> a", "      a -> b  b.rs:3"]);
        assert!(lines[3].starts_with("sizes: 2 ("), "{text}");
        assert_eq!(lines[4..], ["  a.rs  701 lines of code", "  c.rs  702 lines of code"]);
    }
}
