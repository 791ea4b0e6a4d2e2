//! Membership in an ordered sequence, asked in order: a map of all peers of an interface would cost more than the comparison.

use std::iter::Peekable;

/// Asks which of many things are among others, both in the same order: in one go through them.
pub struct SortedCursor<'a, T: 'a, I: Iterator<Item = &'a T>>(Peekable<I>);

impl<'a, T: Ord + 'a, I: Iterator<Item = &'a T>> SortedCursor<'a, T, I> {
    /// Asks among these, which are in order.
    pub fn new(items: impl IntoIterator<IntoIter = I>) -> Self {
        Self(items.into_iter().peekable())
    }

    /// Whether `item` is among them; no item comes before the one that was asked for last.
    pub fn has(&mut self, item: &T) -> bool {
        while self.0.next_if(|other| *other < item).is_some() {}
        self.0.peek().is_some_and(|other| *other == item)
    }
}
