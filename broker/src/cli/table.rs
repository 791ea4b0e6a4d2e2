//! Text for people: aligned columns, and colour where a terminal shows it.

use std::fmt::Write as _;

use wgkex_common::style::{Colour, Style};

use crate::fleet::status::printable;

/// A cell of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    colour: Colour,
    is_number: bool,
}

impl Cell {
    /// A text, without characters that control a terminal.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self { text: printable(text), colour: Colour::Plain, is_number: false }
    }

    /// A number, or something else that stands to the right.
    #[must_use]
    pub fn number(number: &impl ToString) -> Self {
        Self { is_number: true, ..Self::text(&number.to_string()) }
    }

    /// The same in this colour.
    #[must_use]
    pub fn coloured(self, colour: Colour) -> Self {
        Self { colour, ..self }
    }
}

/// The lines of a table whose columns are aligned; without blanks at the end of a line.
#[must_use]
pub fn table<const COLUMNS: usize>(head: [&str; COLUMNS], rows: &[[Cell; COLUMNS]], style: Style) -> String {
    let width = |cell: &Cell| cell.text.chars().count();
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|at| rows.iter().map(|row| width(&row[at])).fold(head[at].chars().count(), usize::max));
    let numeric: [bool; COLUMNS] = std::array::from_fn(|at| rows.iter().any(|row| row[at].is_number));
    let head: [Cell; COLUMNS] = std::array::from_fn(|at| Cell { is_number: numeric[at], ..Cell::text(head[at]) });
    let mut lines = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width_of_column) in row.iter().zip(widths) {
            let fill = " ".repeat(width_of_column - width(cell));
            let text = style.paint(cell.colour, &cell.text);
            let _ = if cell.is_number { write!(line, "{fill}{text}  ") } else { write!(line, "{text}{fill}  ") };
        }
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_their_colour() {
        let rows = [
            [Cell::text("gw1"), Cell::number(&7), Cell::text("online").coloured(Colour::Good)],
            [Cell::text("gateway2"), Cell::number(&1234), Cell::text("")],
        ];
        let expected = "NAME      COUNT  STATE\n\
                        gw1           7  online\n\
                        gateway2   1234\n";
        assert_eq!(table(["NAME", "COUNT", "STATE"], &rows, Style::Plain), expected);
        let coloured = table(["NAME", "COUNT", "STATE"], &rows, Style::Coloured);
        assert_eq!(coloured, expected.replace("online", "\x1b[32monline\x1b[0m"));
    }

    #[test]
    fn no_text_controls_the_terminal() {
        assert_eq!(Cell::text("a\x1b]0;b\n").text, "a?]0;b?");
    }
}
