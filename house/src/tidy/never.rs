//! Arrows that must not be, finer than those among crates.

use super::arrows::Arrow;
use super::fault::{Fault, Rule};
use crate::resolve::Named;
use crate::sources::Sources;

/// Nothing at or below the left path names anything at or below the right one.
const NEVER: &[(&str, &str)] = &[
    ("vora_data", "tch"),
    ("vora_data", "vora_torch"),
    ("vora_eval", "vora_train"),
    ("vora_recipe", "tch"),
    ("vora_recipe", "vora_torch"),
    ("vora_recipe", "vora_train"),
    ("vora_train::run::trainer", "vora_train::run::plan"),
    ("vora_student", "vora_eval"),
    ("vora_student", "vora_run"),
    ("vora_student", "vora_train"),
];

/// Each arrow of `arrows` that [`NEVER`] forbids, and each of its rows that names no module.
pub(super) fn check(sources: &Sources, arrows: &[Arrow]) -> Vec<Fault> {
    check_against(NEVER, sources, arrows)
}

fn check_against(never: &[(&str, &str)], sources: &Sources, arrows: &[Arrow]) -> Vec<Fault> {
    let exists = |path: &str| (0..sources.modules.len()).any(|module| sources.path_of(module) == path);
    let outside = |path: &str| !path.starts_with("vora_");
    let mut faults = Vec::new();
    for (from, to) in never {
        for path in [from, to].into_iter().filter(|path| !outside(path) && !exists(path)) {
            let what = format!("`{from}` -> `{to}` is forbidden, but there is no module `{path}`: mend the table");
            faults.push(Fault { rule: Rule::Never, place: file!().to_owned(), what });
        }
    }
    for arrow in arrows {
        let from = sources.path_of(arrow.from);
        let to = match &arrow.to {
            Named::Outside(path) => path.clone(),
            named => sources.full_path(named),
        };
        for (left, right) in never.iter().filter(|(left, right)| lies_in(&from, left) && lies_in(&to, right)) {
            let place = sources.place(arrow.from, arrow.line);
            let what = format!("`{left}` must not know `{right}`: {} is `{to}`", arrow.written);
            faults.push(Fault { rule: Rule::Never, place, what });
        }
    }
    faults
}

fn lies_in(path: &str, room: &str) -> bool {
    path.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[cfg(test)]
mod tests {
    use super::super::arrows;
    use super::*;
    use crate::small::sources;

    #[test]
    fn forbidden_arrows_are_found_wherever_the_name_comes_from() {
        let sources = sources(&[
            ("vora_a/lib.rs", "mod config; mod student; mod configure; pub use student::Student;"),
            ("vora_a/config.rs", "mod inner;"),
            ("vora_a/config/inner.rs", "use crate::Student;\nfn f() -> tch::Tensor { vora_b::g() }"),
            ("vora_a/configure.rs", "use crate::Student;"),
            ("vora_a/student.rs", "pub struct Student;"),
            ("vora_b/lib.rs", "pub fn g() {}"),
        ]);
        let arrows = arrows::all(&sources).found;
        let found = |never: &[(&str, &str)]| -> Vec<String> {
            let faults = check_against(never, &sources, &arrows);
            faults.into_iter().map(|fault| format!("{} {}", fault.place, fault.what)).collect()
        };
        assert_eq!(
            found(&[("vora_a::config", "vora_a::student")]),
            ["vora_a/config/inner.rs:1 `vora_a::config` must not know `vora_a::student`: crate::Student is \
              `vora_a::student::Student`"]
        );
        assert_eq!(found(&[("vora_a::config", "tch"), ("vora_a", "vora_b")]).len(), 2);
        assert!(found(&[("vora_a::student", "vora_a::config"), ("vora_b", "vora_a")]).is_empty());
    }

    #[test]
    fn a_row_that_protects_nothing_is_a_fault() {
        let sources = sources(&[("vora_a/lib.rs", "mod config;"), ("vora_a/config.rs", "")]);
        let faults = check_against(&[("vora_a::config", "vora_a::student")], &sources, &[]);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].what.contains("no module `vora_a::student`"), "{}", faults[0].what);
    }
}
