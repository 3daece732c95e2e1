// Sort a table by the column whose heading is clicked: numbers by value, the rest by text, n/a always last.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = Array.from(body.rows);
  Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => {
        const text = row.cells[column].textContent.trim();
        const number = Number(text);
        return { missing: text === "n/a", text, number: text !== "" && !Number.isNaN(number) ? number : null };
      };
      const rows = original.map((row) => ({ row, key: key(row) }));
      rows.sort((a, b) => {
        if (a.key.missing !== b.key.missing) return a.key.missing ? 1 : -1;
        const both = a.key.number !== null && b.key.number !== null;
        const order = both ? a.key.number - b.key.number : a.key.text.localeCompare(b.key.text);
        return ascending ? order : -order;
      });
      body.append(...rows.map((item) => item.row));
    });
  });
}
