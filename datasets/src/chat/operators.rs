//! Counting what operators build. The engine bounds neither `+` nor `~`, so `s + s` in a loop of forty would ask
//! for a terabyte, and it offers no hook. But results can be passed through the counting filter by rewriting the
//! template's text: `a + b + c` becomes `((a + b)|_built + c)|_built`, level by level, as the engine itself groups.
//! Filters and slices are followed by the same filter.

use super::lexer::{next_tag, raw_end, strip_marks, token_len};

/// The counting filter.
const COUNT: &str = "|_built";

/// Brackets may nest this deep in one tag; the engine's own parser gives up soon after.
const MAX_NESTING: usize = 100;

/// The operators that build texts, loosest first; those of one level group to the left.
const LEVELS: [&[&str]; 3] = [&["~"], &["+", "-"], &["*", "/", "//", "%"]];

/// Words that end an operand: all that bind more loosely than the operators, and those that begin or end the
/// expressions of statements.
const LOOSE: [&str; 30] = [
    "and",
    "or",
    "not",
    "in",
    "if",
    "else",
    "elif",
    "for",
    "set",
    "call",
    "with",
    "filter",
    "macro",
    "include",
    "import",
    "from",
    "as",
    "ignore",
    "missing",
    "recursive",
    "block",
    "extends",
    "do",
    "autoescape",
    ",",
    ":",
    "=",
    "==",
    "<",
    ">",
];

/// A template whose operators are counted, or what is wrong with it.
pub fn guard(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len().saturating_mul(2));
    let mut rest = source;
    while let Some(tag) = next_tag(rest)? {
        out.push_str(tag.before);
        out.push_str(tag.open);
        let (head, inner, tail) = strip_marks(tag.body);
        out.push_str(head);
        out.push_str(&rewrite(inner)?);
        out.push_str(tail);
        out.push_str(tag.close);
        rest = tag.after;
        if tag.open == "{%" && inner.trim() == "raw" {
            // Nothing in a raw block is a tag.
            let (raw, after) = rest.split_at_checked(raw_end(rest)).unwrap_or((rest, ""));
            out.push_str(raw);
            rest = after;
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The inside of a tag. Brackets are rewritten from the inside out and then stand as one token.
fn rewrite(inner: &str) -> Result<String, String> {
    let mut open: Vec<(String, Vec<String>)> = vec![(String::new(), Vec::new())];
    let mut rest = inner;
    while !rest.is_empty() {
        let (token, after) = rest.split_at_checked(token_len(rest)).ok_or("it cannot be read")?;
        rest = after;
        match token {
            "(" | "[" | "{" => {
                if open.len() > MAX_NESTING {
                    return Err(format!("brackets nest deeper than {MAX_NESTING}"));
                }
                open.push((token.to_owned(), Vec::new()));
            }
            ")" | "]" | "}" => {
                let (bracket, tokens) = open.pop().ok_or("a bracket is closed that was not opened")?;
                let parent = open.last_mut().ok_or("a bracket is closed that was not opened")?;
                let is_slice = bracket == "[" && tokens.iter().any(|t| t == ":") && ends_operand(&parent.1);
                parent.1.push(format!("{bracket}{}{token}", group(tokens)));
                if is_slice && !rest.trim_start().starts_with(['.', '[', '(']) {
                    parent.1.push(COUNT.to_owned());
                }
            }
            _ => {
                if let Some((_, tokens)) = open.last_mut() {
                    tokens.push(token.to_owned());
                }
            }
        }
    }
    match (open.pop(), open.is_empty()) {
        (Some((_, tokens)), true) => Ok(group(tokens)),
        _ => Err("a bracket is not closed".to_owned()),
    }
}

fn is_blank(token: &str) -> bool {
    token.trim().is_empty()
}

fn is_operator(token: &str) -> bool {
    LEVELS.iter().any(|level| level.contains(&token)) || token == "**"
}

fn is_loose(token: &str) -> bool {
    LOOSE.contains(&token) || matches!(token, "!=" | "<=" | ">=")
}

/// Whether what comes next in these tokens follows an operand, so that a sign there is no sign of a number and a
/// bracket no list.
fn ends_operand(tokens: &[String]) -> bool {
    tokens.iter().rev().find(|t| !is_blank(t)).is_some_and(|t| !is_operator(t) && !is_loose(t))
}

/// Rewrites the chains of operators in tokens that are in no bracket.
fn group(tokens: Vec<String>) -> String {
    let mut out = String::new();
    let mut chain = Vec::new();
    let mut after_is = false;
    for token in tokens {
        // `is not` belongs to its operand: tests bind like filters.
        let is_test = after_is && matches!(token.as_str(), "not" | "in");
        if is_loose(&token) && !is_test {
            out.push_str(&level(&chain, 0));
            chain.clear();
            out.push_str(&token);
        } else {
            if !is_blank(&token) {
                after_is = token == "is" || after_is && token == "not";
            }
            chain.push(token);
        }
    }
    out.push_str(&level(&chain, 0));
    out
}

/// Rewrites a chain of operands whose loosest operators are those of `LEVELS[depth]`.
fn level(chain: &[String], depth: usize) -> String {
    let Some(operators) = LEVELS.get(depth) else { return filters(chain) };
    let mut splits = Vec::new();
    for (at, token) in chain.iter().enumerate() {
        if operators.contains(&token.as_str()) && chain.get(..at).is_some_and(ends_operand) {
            splits.push(at);
        }
    }
    let next = depth.saturating_add(1);
    let Some(first) = splits.first() else { return level(chain, next) };
    // Blanks around the chain stay outside of the brackets, so that words do not run together.
    let mut out = blanks_before(chain);
    out.push_str(&"(".repeat(splits.len()));
    out.push_str(level(chain.get(..*first).unwrap_or_default(), next).trim());
    for (i, at) in splits.iter().enumerate() {
        let end = splits.get(i.saturating_add(1)).copied().unwrap_or(chain.len());
        let operand = chain.get(at.saturating_add(1)..end).unwrap_or_default();
        let operator = chain.get(*at).map_or("", String::as_str);
        out.push_str(&format!(" {operator} {}){COUNT}", level(operand, next).trim()));
    }
    out.push(' ');
    out
}

fn blanks_before(chain: &[String]) -> String {
    chain.iter().take_while(|t| is_blank(t)).map(String::as_str).collect()
}

/// Adds the count after each filter: `|`, its name, and its arguments if it has any.
fn filters(tokens: &[String]) -> String {
    let mut out = String::new();
    let mut state = Filter::None;
    for token in tokens {
        let continues = match state {
            Filter::Named => token.starts_with('('),
            Filter::Bar => true,
            _ => false,
        };
        if state == Filter::Named && !continues && !is_blank(token) {
            out.push_str(COUNT);
            state = Filter::None;
        }
        out.push_str(token);
        state = match state {
            _ if token == "|" => Filter::Bar,
            Filter::Bar if is_blank(token) => Filter::Bar,
            Filter::Bar => Filter::Named,
            Filter::Named if continues => {
                out.push_str(COUNT);
                Filter::None
            }
            other => other,
        };
    }
    if state == Filter::Named {
        let end = out.trim_end().len();
        out.insert_str(end, COUNT);
    }
    out
}

/// Where in a filter's text the scan is.
#[derive(Clone, Copy, PartialEq)]
enum Filter {
    None,
    Bar,
    Named,
}

#[cfg(test)]
mod tests {
    use super::guard;

    #[test]
    fn chains_are_grouped_as_the_engine_groups_them() {
        for (source, expected) in [
            ("{{ a }}", "{{ a }}"),
            ("{{- a + b -}}", "{{- (a + b)|_built -}}"),
            ("{{ a + b + c }}", "{{ ((a + b)|_built + c)|_built }}"),
            ("{{ a ~ b + c * d }}", "{{ (a ~ (b + (c * d)|_built)|_built)|_built }}"),
            ("{{ x[i - 1].y }}", "{{ x[(i - 1)|_built ].y }}"),
            ("{% if a + b in c %}", "{% if (a + b)|_built in c %}"),
            ("{% set x = -1 %}", "{% set x = -1 %}"),
            ("{{ a | trim }}", "{{ a | trim|_built }}"),
            ("{{ a|f(b + 1)|g + c }}", "{{ (a|f((b + 1)|_built )|_built|g|_built + c)|_built }}"),
            ("{{ a[1:] }}", "{{ a[1:]|_built }}"),
            ("{{ '+ }}' }}{# {{ a + b }} #}", "{{ '+ }}' }}{# {{ a + b }} #}"),
            ("{% raw %}{{ a + b }}{% endraw %}{{ a + b }}", "{% raw %}{{ a + b }}{% endraw %}{{ (a + b)|_built }}"),
            ("{% if a is not none and b %}", "{% if a is not none and b %}"),
        ] {
            assert_eq!(guard(source).expect(source).replace("  ", " "), expected, "{source}");
        }
        for source in ["{{ a", "{{ (a }}", "{{ a) }}", "{% if '"] {
            assert!(guard(source).is_err(), "{source}");
        }
    }
}
