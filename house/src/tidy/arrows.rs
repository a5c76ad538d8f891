//! Arrows: what the code of each module names, and where.

use std::collections::HashSet;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Meta};

use super::fault::{Fault, Rule};
use crate::resolve::Named;
use crate::sources::{ModuleId, NamePath, Sources, imports};

/// The module `from` names `to`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Arrow {
    pub from: ModuleId,
    pub to: Named,
    pub line: usize,
    /// The path as it is written.
    pub written: String,
}

/// What the code of the workspace names.
#[derive(Debug, Default)]
pub(super) struct Arrows {
    /// Each path once per line.
    pub found: Vec<Arrow>,
    /// Paths that lead nowhere, by rules that are not followed here.
    pub lost: Vec<Fault>,
}

/// Walks the code of every module.
pub(super) fn all(sources: &Sources) -> Arrows {
    let mut arrows = Arrows::default();
    for (module, here) in sources.modules.iter().enumerate() {
        let mut bound = Bound::default();
        here.code.iter().for_each(|item| bound.visit_item(item));
        let mut walk = Walk { sources, module, bound: bound.0, arrows: Arrows::default() };
        here.code.iter().for_each(|item| walk.visit_item(item));
        arrows.found.append(&mut walk.arrows.found);
        arrows.lost.append(&mut walk.arrows.lost);
    }
    arrows
}

/// The names that a pattern binds somewhere in a module: used alone they are variables.
#[derive(Default)]
struct Bound(HashSet<String>);

impl<'a> Visit<'a> for Bound {
    fn visit_pat_ident(&mut self, pattern: &'a syn::PatIdent) {
        self.0.insert(pattern.ident.to_string());
        visit::visit_pat_ident(self, pattern);
    }
}

struct Walk<'a> {
    sources: &'a Sources,
    module: ModuleId,
    bound: HashSet<String>,
    arrows: Arrows,
}

impl Walk<'_> {
    fn arrow(&mut self, path: &NamePath, line: usize) {
        if self.sources.modules[self.module].test_lines.contains(&line) {
            return;
        }
        let named = self.sources.resolve(self.module, path);
        if named.is_empty() {
            let what = format!("`{}` leads to nothing that a file declares", path.names.join("::"));
            let place = self.sources.place(self.module, line);
            self.arrows.lost.push(Fault { rule: Rule::Lost, place, what });
        }
        for found in named {
            let own = |module| self.sources.home(module) == self.sources.home(self.module);
            let local = match &found.named {
                Named::Outside(_) => path.names.len() == 1, // a variable, a name of the prelude
                named => self.sources.defined_in(named).is_some_and(own),
            };
            if local {
                continue;
            }
            let written = path.names.join("::");
            let arrow = Arrow { from: self.module, to: found.named, line, written };
            if !self.arrows.found.contains(&arrow) {
                self.arrows.found.push(arrow);
            }
        }
    }

    /// A path in code. One that a `use` of the module explains adds no arrow: that of the `use` is there.
    fn path(&mut self, path: &NamePath, line: usize) {
        let Some(first) = path.names.first() else { return };
        let explained = match self.sources.import_of(self.module, first) {
            _ if path.absolute => false,
            Some(import) => {
                let found = self.sources.resolve(self.module, &import.path);
                path.names.len() == 1 || !found.iter().any(|found| matches!(found.named, Named::Module(_)))
            }
            None => path.names.len() == 1 && (self.bound.contains(first) || self.sources.declares(self.module, first)),
        };
        if !explained {
            self.arrow(path, line);
        }
    }

    /// The paths among tokens that are not parsed: names joined by `::`.
    fn tokens(&mut self, tokens: &TokenStream) {
        let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
        let is = |at: usize, what: char| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == what);
        let joined = |at: usize| is(at, ':') && is(at + 1, ':');
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            match token {
                TokenTree::Group(group) => self.tokens(&group.stream()),
                TokenTree::Ident(ident) => {
                    let line = ident.span().start().line;
                    let absolute = at >= 2 && joined(at - 2);
                    let is_field = at >= 1 && is(at - 1, '.') && !(at >= 2 && is(at - 2, '.'));
                    let mut names = vec![ident.to_string()];
                    while joined(at + 1) {
                        let Some(TokenTree::Ident(next)) = tokens.get(at + 3) else { break };
                        names.push(next.to_string());
                        at += 3;
                    }
                    // `name = value` in a call or attribute is a key.
                    let is_key = names.len() == 1 && is(at + 1, '=') && !is(at + 2, '=');
                    if !is_field && !is_key {
                        self.path(&NamePath { absolute, names }, line);
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// The paths in strings of an attribute, as serde's `with = "a::b"` has them.
    fn strings(&mut self, tokens: &TokenStream) {
        for token in tokens.clone() {
            match token {
                TokenTree::Group(group) => self.strings(&group.stream()),
                TokenTree::Literal(literal) if literal.to_string().contains("::") => {
                    let line = literal.span().start().line;
                    let path = literal.to_string().trim_matches('"').parse::<TokenStream>();
                    if let Ok(path) = path.map(syn::parse2::<syn::Path>)
                        && let Ok(path) = path
                    {
                        self.path(&name_path(&path), line);
                    }
                }
                _ => {}
            }
        }
    }
}

fn name_path(path: &syn::Path) -> NamePath {
    let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    NamePath { absolute: path.leading_colon.is_some(), names }
}

impl<'a> Visit<'a> for Walk<'_> {
    fn visit_path(&mut self, path: &'a syn::Path) {
        self.path(&name_path(path), path.segments[0].ident.span().start().line);
        visit::visit_path(self, path);
    }

    fn visit_item_fn(&mut self, function: &'a syn::ItemFn) {
        if !function.attrs.iter().any(|attribute| attribute.path().is_ident("test")) {
            visit::visit_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        for import in imports(item) {
            self.arrow(&import.path, import.line);
        }
    }

    fn visit_macro(&mut self, call: &'a syn::Macro) {
        self.visit_path(&call.path);
        self.tokens(&call.tokens);
    }

    fn visit_visibility(&mut self, _: &'a syn::Visibility) {}

    fn visit_attribute(&mut self, attribute: &'a Attribute) {
        match &attribute.meta {
            Meta::List(list) if !list.path.is_ident("cfg") && !list.path.is_ident("doc") => {
                self.tokens(&list.tokens);
                self.strings(&list.tokens);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small::sources;

    /// The arrows of `code` in module `a`, where `b` has an item `x` and re-exports `c::y` and `c::Deep`.
    fn arrows_of(code: &str) -> Vec<String> {
        let sources = sources(&[
            ("one/lib.rs", "mod a; mod b; mod c;"),
            ("one/a.rs", code),
            ("one/b.rs", "pub fn x() {} pub use crate::c::{y, Deep};"),
            ("one/c.rs", "pub fn y() {} pub struct Deep; pub mod in_c { pub fn z() {} }"),
        ]);
        let from_a = |arrow: &&Arrow| sources.path_of(arrow.from).starts_with("one::a");
        let arrows = all(&sources).found;
        let named = arrows.iter().filter(from_a).map(|arrow| (arrow.line, sources.full_path(&arrow.to)));
        named.filter(|(_, to)| to.starts_with("one::")).map(|(line, to)| format!("{line} {to}")).collect()
    }

    #[test]
    fn uses_and_paths_are_arrows_to_the_definition() {
        assert_eq!(arrows_of("use crate::b::{x,\n    Deep};"), ["1 one::b::x", "2 one::c::Deep"]);
        assert_eq!(arrows_of("fn f() { super::b::y() }"), ["1 one::c::y"]);
        assert_eq!(arrows_of("fn f(_: &crate::b::Deep) -> Vec<crate::c::Deep> {}"), ["1 one::c::Deep"; 2]);
        assert_eq!(arrows_of("use crate::c;\nfn f() { c::in_c::z() }"), ["1 one::c", "2 one::c::in_c::z"]);
        assert_eq!(arrows_of("impl crate::c::Deep { }"), ["1 one::c::Deep"]);
        assert_eq!(arrows_of("fn f() {\n    use crate::b::x;\n    x();\n}"), ["2 one::b::x"]);
    }

    #[test]
    fn a_path_that_leads_nowhere_is_told() {
        let sources = sources(&[
            ("one/lib.rs", "mod a;\nfn f() { a::made_by_a_macro(); a::ffi() }"),
            ("one/a.rs", "extern \"C\" { pub fn ffi(); }"),
        ]);
        let lost = all(&sources).lost;
        assert_eq!(lost.len(), 1);
        assert_eq!(lost[0].place, "one/lib.rs:2");
    }

    #[test]
    fn a_use_explains_the_paths_that_begin_with_its_name() {
        assert_eq!(arrows_of("use crate::c::Deep;\nfn f() { Deep::new(Deep) }"), ["1 one::c::Deep"]);
    }

    #[test]
    fn globs_bring_names() {
        assert_eq!(arrows_of("use crate::b::*;\nfn f() { x();\n y() }"), ["1 one::b", "2 one::b::x", "3 one::c::y"]);
        let variable = "use crate::b::*;\nfn f(x: u8) -> u8 { x }";
        assert_eq!(arrows_of(variable), ["1 one::b"]);
    }

    #[test]
    fn macro_calls_and_attributes_are_looked_into() {
        assert_eq!(arrows_of("fn f() { println!(\"{}\", crate::b::x()) }"), ["1 one::b::x"]);
        assert_eq!(arrows_of("fn f() { vec![[super::c::in_c::z(); 2]]; }"), ["1 one::c::in_c::z"]);
        assert_eq!(arrows_of("struct S {\n #[serde(with = \"crate::c\")]\n s: u8 }"), ["2 one::c"]);
        assert_eq!(arrows_of("struct S {\n #[arg(value_parser = crate::b::x)]\n s: u8 }"), ["2 one::b::x"]);
        assert_eq!(arrows_of("use crate::b::*; fn f() { g!(self.x, x = 1) }"), ["1 one::b"]);
    }

    #[test]
    fn tests_docs_and_comments_are_no_arrows() {
        assert_eq!(arrows_of("#[cfg(test)]\nmod tests {\n    use crate::b::x;\n}"), [""; 0]);
        assert_eq!(arrows_of("#[test]\nfn t() { crate::b::x() }"), [""; 0]);
        assert_eq!(arrows_of("struct S;\nimpl S {\n    #[cfg(test)]\n    fn t() { crate::b::x() }\n}"), [""; 0]);
        assert_eq!(arrows_of("//! See [`crate::b::x`].\n// crate::b::x\n/// crate::b::x\nfn f() {}"), [""; 0]);
        assert_eq!(arrows_of("#[cfg(not(test))]\nuse crate::b::x;"), ["2 one::b::x"]);
    }
}
