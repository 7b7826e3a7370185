//! DataFrames as HTML tables.

use super::Table;
use super::html::escape;
use polars::prelude::{AnyValue, Column};
use std::fmt::Write;

/// Rows beyond which a table is folded away.
const OPEN_ROWS: usize = 12;

/// The table; a long one opens on a click.
pub(crate) fn to_html(table: &Table) -> crate::Result<String> {
    let (data, mut out) = (&table.data, String::new());
    let long = data.height() > OPEN_ROWS;
    let caption = escape(&table.caption);
    if long {
        let _ = write!(out, "<details><summary>Table: {caption}</summary>");
    }
    out.push_str("<div class=\"scroll\"><table>");
    if !long {
        let _ = write!(out, "<caption>{caption}</caption>");
    }
    out.push_str("<thead><tr>");
    for column in data.columns() {
        let _ = write!(out, "<th{}>{}</th>", class(column), escape(column.name()));
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in 0..data.height() {
        out.push_str("<tr>");
        for column in data.columns() {
            let _ = write!(out, "<td{}>{}</td>", class(column), escape(&cell(&column.get(row)?)));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>");
    if long {
        out.push_str("</details>");
    }
    out.push('\n');
    Ok(out)
}

/// Text is set to the left, numbers to the right.
fn class(column: &Column) -> &'static str {
    if column.dtype().is_string() { " class=\"text\"" } else { "" }
}

fn cell(value: &AnyValue<'_>) -> String {
    match value {
        AnyValue::Null => "\u{2013}".to_owned(),
        AnyValue::Float64(v) => number(*v),
        AnyValue::Float32(v) => number(f64::from(*v)),
        AnyValue::String(text) => (*text).to_owned(),
        AnyValue::StringOwned(text) => text.to_string(),
        other => other.to_string(),
    }
}

/// Four digits that count.
pub(crate) fn number(v: f64) -> String {
    if v == 0.0 || !v.is_finite() {
        return format!("{v}");
    }
    let digits = (3.0 - v.abs().log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{v:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_escaped_and_short() {
        let columns = vec![
            Column::new("<name>".into(), vec!["a&b", "c"]),
            Column::new("x".into(), vec![Some(0.123_456), None]),
            Column::new("n".into(), vec![12_345.678, 0.0]),
        ];
        let html = to_html(&Table::new("t", columns).unwrap()).unwrap();
        for part in ["<th class=\"text\">&lt;name&gt;</th>", "<td class=\"text\">a&amp;b</td>", "<td>0.1235</td>"] {
            assert!(html.contains(part), "{part} in {html}");
        }
        assert!(html.contains("<td>\u{2013}</td>") && html.contains("<td>12346</td>") && html.contains("<td>0</td>"));
    }
}
