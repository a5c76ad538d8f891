//! Which lines of a file are code for tests: those of what stands under `#[cfg(test)]`.

use std::collections::BTreeSet;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Expr, Meta};

/// Whether the item with these attributes is compiled for tests only.
pub fn marks(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => list.parse_args().is_ok_and(|meta| needs_test(&meta)),
        _ => false,
    })
}

/// `test` and `all(test, ..)` hold in tests only; `any(test, ..)` and `not(test)` may hold elsewhere.
fn needs_test(condition: &Meta) -> bool {
    let list = syn::punctuated::Punctuated::<Meta, syn::Token![,]>::parse_terminated;
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(all) if all.path.is_ident("all") => {
            all.parse_args_with(list).is_ok_and(|conditions| conditions.iter().any(needs_test))
        }
        _ => false,
    }
}

/// The attributes of any item.
pub fn attributes(item: &syn::Item) -> &[Attribute] {
    use syn::Item as I;
    match item {
        I::Const(syn::ItemConst { attrs, .. })
        | I::Enum(syn::ItemEnum { attrs, .. })
        | I::ExternCrate(syn::ItemExternCrate { attrs, .. })
        | I::Fn(syn::ItemFn { attrs, .. })
        | I::ForeignMod(syn::ItemForeignMod { attrs, .. })
        | I::Impl(syn::ItemImpl { attrs, .. })
        | I::Macro(syn::ItemMacro { attrs, .. })
        | I::Mod(syn::ItemMod { attrs, .. })
        | I::Static(syn::ItemStatic { attrs, .. })
        | I::Struct(syn::ItemStruct { attrs, .. })
        | I::Trait(syn::ItemTrait { attrs, .. })
        | I::TraitAlias(syn::ItemTraitAlias { attrs, .. })
        | I::Type(syn::ItemType { attrs, .. })
        | I::Union(syn::ItemUnion { attrs, .. })
        | I::Use(syn::ItemUse { attrs, .. }) => attrs,
        _ => &[],
    }
}

/// The lines of a file that are for tests.
pub fn lines(items: &[syn::Item]) -> BTreeSet<usize> {
    let mut found = Lines::default();
    items.iter().for_each(|item| found.visit_item(item));
    found.0
}

#[derive(Default)]
struct Lines(BTreeSet<usize>);

impl Lines {
    /// Takes the lines of `node` where its attributes mark it; otherwise something inside may be marked.
    fn enter(&mut self, node: &impl Spanned, attributes: &[Attribute]) -> bool {
        let marked = marks(attributes);
        if marked {
            self.0.extend(node.span().start().line..=node.span().end().line);
        }
        !marked
    }
}

impl<'a> Visit<'a> for Lines {
    fn visit_item(&mut self, item: &'a syn::Item) {
        if self.enter(item, attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, method: &'a syn::ImplItemFn) {
        if self.enter(method, &method.attrs) {
            visit::visit_impl_item_fn(self, method);
        }
    }

    fn visit_impl_item_const(&mut self, constant: &'a syn::ImplItemConst) {
        self.enter(constant, &constant.attrs);
    }

    fn visit_trait_item_fn(&mut self, method: &'a syn::TraitItemFn) {
        if self.enter(method, &method.attrs) {
            visit::visit_trait_item_fn(self, method);
        }
    }

    fn visit_field(&mut self, field: &'a syn::Field) {
        self.enter(field, &field.attrs);
    }

    fn visit_variant(&mut self, variant: &'a syn::Variant) {
        self.enter(variant, &variant.attrs);
    }

    fn visit_arm(&mut self, arm: &'a syn::Arm) {
        if self.enter(arm, &arm.attrs) {
            visit::visit_arm(self, arm);
        }
    }

    fn visit_field_value(&mut self, value: &'a syn::FieldValue) {
        if self.enter(value, &value.attrs) {
            visit::visit_field_value(self, value);
        }
    }

    fn visit_local(&mut self, local: &'a syn::Local) {
        if self.enter(local, &local.attrs) {
            visit::visit_local(self, local);
        }
    }

    fn visit_stmt_macro(&mut self, call: &'a syn::StmtMacro) {
        self.enter(call, &call.attrs);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        let attributes: &[Attribute] = match expr {
            Expr::Block(block) => &block.attrs,
            Expr::Call(call) => &call.attrs,
            Expr::MethodCall(call) => &call.attrs,
            Expr::If(branch) => &branch.attrs,
            _ => &[],
        };
        if self.enter(expr, attributes) {
            visit::visit_expr(self, expr);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(source: &str) -> Vec<usize> {
        lines(&syn::parse_file(source).unwrap().items).into_iter().collect()
    }

    #[test]
    fn only_what_tests_alone_compile_is_test_code() {
        assert_eq!(lines_of("fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}"), [2, 3, 4, 5]);
        assert_eq!(lines_of("#[cfg(all(test, unix))]\nfn a() {}\nfn b() {}"), [1, 2]);
        assert_eq!(lines_of("#[test]\nfn a() {}"), [0; 0]); // a file of tests
        for outside in ["any(test, unix)", "not(test)", "unix", "feature = \"test\""] {
            assert_eq!(lines_of(&format!("#[cfg({outside})]\nfn a() {{}}")), [0; 0], "{outside}");
        }
    }

    #[test]
    fn methods_and_statements_are_looked_into() {
        let method = "struct S;\nimpl S {\n    fn a() {}\n    #[cfg(test)]\n    fn b() {}\n}";
        assert_eq!(lines_of(method), [4, 5]);
        let statement = "fn a() {\n    #[cfg(test)]\n    let b = 1;\n    #[cfg(test)]\n    b();\n    c();\n}";
        assert_eq!(lines_of(statement), [2, 3, 4, 5]);
    }
}
