// Tables and code that are wider than the window scroll: by keyboard too, which only reaches what takes the focus.
// The theme wraps a table when it comes into view.
function reachable() {
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    wide.tabIndex = 0;
  }
}
new MutationObserver(reachable).observe(document.querySelector(".md-content"), {childList: true, subtree: true});
reachable();

// The theme's search is a dialog without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
